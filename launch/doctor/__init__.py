"""`fluxfill doctor`: what a bug report needs to say of a machine, a config and a run, without secrets."""
