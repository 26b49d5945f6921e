import pytest

from configs.legacy.secrets import holds_secret_variable, is_secret


@pytest.mark.parametrize(
    "key, value",
    [
        ("save.hf_token", "anything"),
        ("--huggingface_token", "anything"),
        ("wandb_api_key", "anything"),
        ("aws_secret_access_key", "anything"),
        ("publishing.password", "anything"),
        ("auth", {"user": "me"}),
        ("save.hf_repo_id", "hf_abcdefghijKLMN"),
        ("datasets[0].folder_path", "https://me:word@example.org/pictures"),
        ("datasets[0].folder_path", "https://example.org/pictures?token=abc"),
        ("note", "0123456789abcdef0123456789abcdef01234567"),
        ("prompts", ["a cat", "by hf_abcdefghijKLMN"]),
        ("providers", [{"name": "s3", "password": "x"}]),
        ("repo", "${HF_TOKEN}"),
        ("repo", "${WANDB_CREDENTIALS}"),
        ("hf_token.value", "anything"),
        ("credentials[0].user", "me"),
        ("note", "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz"),
        ("note", "AIzaSyA-0123456789abcdefghijklmnopqrst"),
        ("note", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.abcdefghijk"),
        ("repo", "https://abcdefgh@github.com/me/pictures"),
        ("repo", "s3://me:a/b@bucket/pictures"),
        ("folder_path", "https://example.org/a.tar?x=1&access_token=abc"),
        ("folder_path", "https://example.org/a.tar?X-Amz-Credential=abc"),
    ],
)
def test_a_secret_is_known_by_its_name_or_its_value(key, value):
    assert is_secret(key, value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("datasets[0].keep_tokens", 1),
        ("datasets[0].token_dropout_rate", 0.1),
        ("subsets[0].class_tokens", "a room"),
        ("max_token_length", 225),
        ("save.hf_token", None),
        ("save.hf_token", ""),
        ("model.name_or_path", "black-forest-labs/FLUX.1-dev"),
        ("folder_path", "${DATA}/pictures"),
        ("folder_path", "s3://bucket/pictures"),
        ("folder_path", "https://example.org:8080/pictures?v=2"),
        ("model.name_or_path", "https://example.org:8080/FLUX@main"),
        ("guidance", 3.5),
    ],
)
def test_what_only_looks_like_one_is_none(key, value):
    assert not is_secret(key, value)


def test_a_variable_is_a_secret_by_its_name():
    assert holds_secret_variable("https://${HF_TOKEN}@example.org")
    assert not holds_secret_variable("${DATA_ROOT}/pictures")
