"""The FLUX.1-Fill transformer, flow matching, and bases in 4 and 8 bits."""
