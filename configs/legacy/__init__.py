"""Configs of other trainers, read and translated: ai-toolkit, its older `finetune` trainer, sd-scripts, the kohya_ss
GUI, SimpleTuner."""
