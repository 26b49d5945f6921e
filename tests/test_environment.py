"""Whoever runs the tests, and where, changes nothing about them."""

import logging
import os

from tests.environment import environment_of_before, forget_the_machine


def test_a_machines_own_variables_are_taken_out_and_the_rest_stays():
    kept = {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "HF_HOME": "/hf", "CUDA_HOME": "/cuda", "RANKING": "1"}
    foreign = ("FORCE_COLOR", "COLUMNS", "SLURM_JOB_ID", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    foreign += ("http_proxy", "HTTPS_PROXY", "no_proxy", "AWS_PROFILE", "HF_HUB_OFFLINE", "HF_TOKEN", "FLUXFILL_HOLD")
    found = kept | dict.fromkeys(foreign, "x") | {"OMP_NUM_THREADS": "8"}
    forget_the_machine(found)
    assert found == kept | {"OMP_NUM_THREADS": "1"}


def test_what_a_program_left_in_this_process_is_gone():
    logger = logging.getLogger("fluxfill")
    before = dict(os.environ), logger.level, logger.propagate, [*logger.handlers]
    with environment_of_before():
        os.environ["LEFT"] = "x"
        os.environ.pop("PATH")
        logger.setLevel(1)
        logger.propagate = not logger.propagate
        logger.addHandler(logging.NullHandler())
    assert (dict(os.environ), logger.level, logger.propagate, logger.handlers) == before
