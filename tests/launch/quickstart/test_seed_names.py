import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.loading import json_schema
from configs.problems import dotted_keys
from launch.command import REPO_ROOT
from launch.quickstart.seed_names import render_seed_names, seed_names

NAMES = """
quick_start_migration.py scripts/migrate_inpainting_data.py test_standard_trainer.py migrate_your_data.py
config/train_flux_inpainting_standard.yaml config/train_flux_inpainting.yaml start_training.bat start_training.sh
FLUX_INPAINTING_MIGRATION_GUIDE.md MIGRATION_COMPARISON.md TROUBLESHOOTING.md run.py --gpu_memory --num_gpus SOURCE_DIRS
target_images masked_images masks cache_latents_to_disk batch_size gradient_accumulation_steps optimizer quantize
resolution lr TrainFineTuneProcess.py data_loader.py 79GB 40GB 24GB 80GB 3.5s 1.2s 700行 30行 -95% -50% +200% 3倍 生产级
Latent 8bit 梯度检查点 OOM NaN 自动错误处理 检查点恢复 显存不足 训练速度慢 GPU
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_every_name_of_the_document_has_its_row(name: str) -> None:
    assert any(name in row["seed"] for row in seed_names())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_keys_and_files_that_are_named_are_there(language: str) -> None:
    text = "\n".join(row[language] for row in seed_names())
    sections = "run|model|method|data|train|flow|parallel|validation|checkpoint|guard|logging"
    keys = set(re.findall(rf"`((?:{sections})\.\w+)", text))
    assert len(keys) > 8 and keys <= set(dotted_keys(json_schema()))
    files = re.findall(r"`((?:configs|trainer)/[\w./]+)`", text)
    assert files and [file for file in files if not (REPO_ROOT / file).exists()] == []


def test_both_languages_say_the_same() -> None:
    for row in seed_names():
        english, chinese = (
            re.findall(r"`[^`]+`", row[language].replace("docs/zh/", "docs/")) for language in ("en", "zh")
        )
        assert sorted(english) == sorted(chinese), row["seed"]


def test_the_table_is_markdown(tmp_path: Path) -> None:
    lines = render_seed_names().splitlines()
    assert len(lines) == len(seed_names()) + 2 and lines[1] == "| --- | --- |"
    assert all(line.count("|") == 3 for line in lines)
    command = [sys.executable, "-m", "launch.quickstart.seed_names", "zh"]
    assert subprocess.check_output(command, text=True, cwd=tmp_path) == render_seed_names("zh") + "\n"
