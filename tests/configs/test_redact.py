import pytest

from configs.redact import HIDDEN, is_secret_name, redact

SECRET = "s3cr3tvalue0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"hf_token: {SECRET}",
        f"HF_TOKEN={SECRET}",
        f'{{"token": "{SECRET}", "a": 1}}',
        f"password: '{SECRET} with spaces'",
        f"WANDB_API_KEY={SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"aws_access_key_id = {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f"curl -H 'authorization: {SECRET}'",
        f"got Bearer {SECRET} back",
        f"main.py --token {SECRET} --steps 3",
        f"main.py --api-key={SECRET}",
        f"curl -u me:{SECRET} https://host/a",
        f"curl -ume:{SECRET} https://host/a",
        f"curl --user 'me:{SECRET} with spaces'",
        f"curl --proxy-user=me:{SECRET} host",
        f"http --auth me:{SECRET} host",
        f"wget --http-password {SECRET}",
        f"gpg --passphrase '{SECRET} with spaces'",
        f"sshpass -p {SECRET} ssh host",
        f"mysql -u me -p{SECRET} db",
        f"aws configure set aws_secret_access_key {SECRET}",
        f"machine host login me password {SECRET}",
        f"Proxy-Authorization: Basic {SECRET}",
        f"Cookie: session={SECRET}",
        f"X-Amz-Signature={SECRET}",
        f"X-Amz-Credential={SECRET}/us-east-1",
        f"git clone https://{SECRET}@github.com/a/b",
        f"https://someone:{SECRET}@host/folder/a.tar",
        f"s3://bucket/a.tar?X-Amz-Signature={SECRET}&X-Amz-Date=1",
        f"reading 'https://host/a.png?sig={SECRET}'.",
        "hf_abcdefghijklmnopqrstuvwxyz0123",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.abcdefghijk",
        f'{{"password": "a \\"b {SECRET}"}}',
        f"AccountKey={SECRET}==;EndpointSuffix=x",
        f"license_key: {SECRET}",
        f"wandb_key: {SECRET}",
        f"DB_PASS={SECRET}",
        f"pwd: {SECRET}",
        f"webhook_url: hooks.example.org/{SECRET}",
        "0123456789abcdef0123456789abcdef01234567",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_is_gone(text):
    told = redact(f"before {text}\nafter", home="/home/someone")
    assert SECRET not in told and "hf_a" not in told and "ghp_a" not in told and "pat_11" not in told
    assert "0123456789abcdef" not in told
    assert "AKIA" not in told and "eyJ" not in told
    assert told.startswith("before ") and told.endswith("\nafter")


@pytest.mark.parametrize(
    "text",
    [
        "captions: {text_length: 512, dropout: 0.1}",
        "4,608 tokens: 2.80 GiB",
        "max_tokens=512",
        "tokenizer: /models/tokenizer",
        '{"step": 12, "loss": 0.5, "seconds": 1.25}',
        "author: somebody",
        "token: null",
        "https://huggingface.co/black-forest-labs/FLUX.1-Fill-dev",
        "s3://bucket/photos-{000000..000127}.tar",
        "keep_best: hole_psnr",
        "forward pass: 0.1 s",
        "token: (hidden)",
        "docker run --user 1000:1000 image",
        "python -u trainer/main.py --config a.yaml",
        "main.py --password-file a",
        "hub/snapshots/0123456789abcdef0123456789abcdef01234567/vae",
        "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text, home="/home/someone") == text


def test_places_keep_their_host_and_folder():
    assert redact("cache: https://me:pw@host:81/a/b?x=1", home="/h") == "cache: https://host:81/a/b"
    assert redact(f"token: '{SECRET}', next: 1", home="/h") == f"token: '{HIDDEN}', next: 1"


@pytest.mark.parametrize(
    "text",
    [
        "password: >\n  a\n\n  {}",
        "password: |-\n  {}",
        "- api_key:\n    - {0}\n    - {0}",
        "api_key:\n- {}",
        "'auth':\n  user: {}",
    ],
)
def test_a_secret_on_the_lines_below_its_name_is_gone(text):
    told = redact(f"a: 1\n{text.format(SECRET)}\nb: 2\n", home="/h")
    assert SECRET not in told and HIDDEN in told and told.startswith("a: 1\n") and told.endswith("\nb: 2\n")


def test_what_stands_below_a_secret_stays():
    told = redact("a:\n  token: |\n    one\n    two\n  steps: 3\n  auth:\n  - x\n  b: 1\ntoken:\nc: 1\n", home="/h")
    assert told == f"a:\n  token: {HIDDEN}\n  steps: 3\n  auth: {HIDDEN}\n  b: 1\ntoken:\nc: 1\n"


def test_the_home_folder_is_short_and_its_namesakes_stay():
    assert redact("/home/ann/a /home/anna/b /home/ann", home="/home/ann") == "~/a /home/anna/b ~"
    assert redact("/data/x", home="/") == "/data/x"


def test_names_of_variables_that_may_hold_secrets_are_known():
    assert all(
        map(is_secret_name, ("HF_TOKEN", "FLUXFILL_WEBHOOK", "WANDB_API_KEY", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY"))
    )
    assert not any(map(is_secret_name, ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "HF_HOME")))
