"""LoRA, DoRA and LoKr: built, read, written."""
