"""The documents tell the truth: every command they show runs, every command and error is in them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import mmsplit
from mmsplit import errors
from mmsplit.checkpoint.header_writer import format_header
from mmsplit.cli.app import app
from mmsplit.synthetic import write_synthetic_checkpoint

ROOT = Path(__file__).parent.parent
SHOWING_COMMANDS = (
    "README.md",
    "docs/usage.md",
    "docs/larger-than-disk.md",
    "docs/other-cuts.md",
    "docs/repair.md",
    "docs/repartition.md",
    "docs/security.md",
    "docs/export.md",
    "docs/consume.md",
)
#: Those whose examples use the small model, as the tests do: what they print is what the commands print.
SHOWING_SMALL_MODEL = ("docs/repair.md", "docs/repartition.md", "docs/security.md", "docs/consume.md")
#: Signatures need the extra `sign`.
CAN_SIGN = importlib.util.find_spec("model_signing") is not None
DOCUMENTS = (*SHOWING_COMMANDS, "docs/python.md", "docs/architecture.md", "docs/errors.md", "docs/reliability.md")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint of the name that the documents use, and keys where signing is possible."""
    directory = tmp_path_factory.mktemp("docs")
    write_synthetic_checkpoint(directory / "Llama-3.2-1B")
    _write_mixture(directory / "Mixture-8x8")
    if CAN_SIGN:
        from cryptography.hazmat.primitives import serialization as to
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption())
        public = key.public_key().public_bytes(to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo)
        (directory / "signer.pem").write_bytes(private)
        (directory / "signer.pub").write_bytes(public)
    return directory


def _write_mixture(directory: Path) -> None:
    """Write a small mixture of eight experts, packed, with a tied head."""
    shapes = {"model.embed_tokens.weight": [2000, 64], "model.norm.weight": [64]}
    for k in range(8):
        at = f"model.layers.{k}"
        shapes |= {f"{at}.input_layernorm.weight": [64], f"{at}.self_attn.q_proj.weight": [64, 64]}
        shapes |= {f"{at}.mlp.gate.weight": [8, 64], f"{at}.mlp.experts.gate_up_proj": [8, 64, 256]}
        shapes[f"{at}.mlp.experts.down_proj"] = [8, 128, 64]
    header = format_header((name, "U8", shape, math.prod(shape)) for name, shape in shapes.items())
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(map(math.prod, shapes.values())))
    (directory / "config.json").write_text('{"architectures": ["MoeForCausalLM"], "num_local_experts": 8}')


@pytest.fixture(scope="module")
def environment(workplace: Path) -> Iterator[dict[str, str]]:
    """Variables of a process for which the Hub is one on loopback that has the documents' model, and takes uploads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "remote")
        from loopback_hub import MEMBER_TOKEN
        from upload_hub import UploadHub
    (workplace / "hub" / "org").mkdir(parents=True)
    (workplace / "hub" / "org" / "llama-250m").symlink_to(workplace / "Llama-3.2-1B")
    with UploadHub(workplace / "hub") as hub:
        yield {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(workplace / "home"),
            "HF_TOKEN": MEMBER_TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


def _commands(document: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return re.findall(r"^ *\$ ((?:mmsplit|rm|dd) .*)$", "\n".join(blocks), re.MULTILINE)


def _furnish(place: Path, workplace: Path, document: str) -> None:
    """Make a directory with the models and keys, and the TOML files that the document shows with their names."""
    place.mkdir()
    for name in ("Llama-3.2-1B", "Mixture-8x8", "signer.pem", "signer.pub"):
        (place / name).symlink_to(workplace / name)
    for name, text in re.findall(r"```toml\n# (\w+\.toml)\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
        (place / name).write_text(text)


@pytest.mark.parametrize("document", SHOWING_COMMANDS)
def test_every_command_shown_runs(document: str, workplace: Path, environment: dict[str, str]) -> None:
    """The commands of a document, run one after the other, all succeed; with the root digest of what they split."""
    place = workplace / document.replace("/", "-")
    _furnish(place, workplace, document)
    root, seen = "", set()
    commands = _commands(document)
    assert commands
    for command in commands:
        if "signer.p" in command and not CAN_SIGN:
            continue
        words = re.sub(r"sha256:[0-9a-f]{64}", root, command).split()
        words = [sys.executable, "-m", *words] if words[0] == "mmsplit" else words
        result = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        found = re.search(r"root digest (sha256:[0-9a-f]{64})", result.stdout)
        root = found[1] if found else root
        seen.add(root)
    if document in SHOWING_SMALL_MODEL:
        shown = set(re.findall(r"sha256:[0-9a-f]{64}", (ROOT / document).read_text()))
        assert shown <= seen, f"{document} shows {shown - seen}, found was {seen}"


@pytest.mark.parametrize("document", ["README.md", "docs/python.md", "docs/other-cuts.md"])
def test_python_examples_run(document: str, workplace: Path, environment: dict[str, str]) -> None:
    """The Python blocks of a document, run as one program, end without an error."""
    place = workplace / f"python-{document.replace('/', '-')}"
    _furnish(place, workplace, document)
    program = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL))
    words = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_pages_with_the_large_model_agree() -> None:
    """The same split of it has one root digest, wherever it is shown."""
    split_of = r"\$ mmsplit split Llama-3.2-1B -o parts --num-parts 2\n(?:.*\n)*?\s*root digest (sha256:[0-9a-f]{64})"
    shown = [re.findall(split_of, (ROOT / document).read_text()) for document in ("docs/usage.md", "docs/export.md")]
    assert all(shown)
    assert len({digest for digests in shown for digest in digests}) == 1


def test_every_command_is_documented() -> None:
    """Each command of the CLI is shown in the usage page, and each of its long options has a help text."""
    usage = (ROOT / "docs/usage.md").read_text()
    context = click.Context(app)
    for name in app.list_commands(context):
        assert f"$ mmsplit {name} " in usage
        command = app.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help


def test_every_error_is_documented() -> None:
    """Each error of the tree stands in docs/errors.md on a line with its exit code."""
    lines = (ROOT / "docs/errors.md").read_text().splitlines()
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.MmsplitError) and value is not errors.MmsplitError:
            assert any(f"`{value.__name__}`" in line and line.startswith(f"| {value.exit_code} ") for line in lines)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Every relative link of a document names a file that is there."""
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_promise_names_tests_that_exist() -> None:
    """A promise whose test is gone is none."""
    text = (ROOT / "docs/reliability.md").read_text()
    named, file = [], ""
    for found, test in re.findall(r"`(tests/[\w/]+\.py|…)(?:::(\w+))?`", text):
        file = file if found == "…" else found
        named.append((file, test))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() or not test, (file, test)
    neighbours = (ROOT / "tests/faults/test_neighbours.py").read_text()
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in neighbours, test
    # Every row of a table of promises names a test, or a file of tests.
    tables = re.findall(r"^\| (?:promise|situation)[^\n]*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) > 5
    for row in "".join(tables).splitlines():
        assert re.search(r"`(tests/|test_|…)|the same \|$", row), row
    for scenario in re.findall(r"scenarios? `([^`]+)`(?: (?:and|to) `([^`]+)`)?", text):
        for name in filter(None, scenario):
            assert f'"{name}"' in (ROOT / "tests/faults/scenarios.py").read_text(), name


def test_every_exported_name_exists() -> None:
    """`mmsplit.__all__` is exactly what can be imported from it, and unknown names are refused."""
    for name in mmsplit.__all__:
        assert getattr(mmsplit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        mmsplit.nope  # noqa: B018


def test_the_test_script_has_help_of_its_own() -> None:
    """Before it prepares anything, and also for a reader that goes away."""
    words = [sys.executable, str(ROOT / "scripts" / "test"), "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "scripts/test --torch" in shown.stdout
    assert shown.stderr == ""
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert gone.stderr == ""
