"""`push`: huggingface_hub's own client publishes a set to a loopback Hub, whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, flip, llama_weights, tree, write_checkpoint
from huggingface_hub import constants
from loopback_fixtures import use_endpoint
from loopback_hub import MEMBER_TOKEN, OUTSIDER_TOKEN
from upload_hub import UploadHub

from mmsplit.errors import (
    AccessDeniedError,
    FormatError,
    IntegrityError,
    MissingPartitionError,
    NetworkError,
    OfflineError,
    RequestError,
)
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.set_card import CARD_MARK
from mmsplit.verbs.pull import pull
from mmsplit.verbs.push import PushResult, push
from mmsplit.verbs.split import split

#: huggingface_hub's own, where it sends a file by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WRITER = HubOptions(token=MEMBER_TOKEN)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two partitions."""
    root = tmp_path_factory.mktemp("made")
    files = {"config.json": CAUSAL_CONFIG, "empty.py": b"", "sub/x.txt": b"abc"}
    write_checkpoint(root / "model", [llama_weights(3)], files=files)
    split(root / "model", root / "set", 2, model_id="meta/Base-1B", revision="v1")
    return root / "set"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another set, of three partitions, whose model has a README."""
    root = tmp_path_factory.mktemp("other")
    write_checkpoint(root / "model", [llama_weights(5)], files={"README.md": b"# The model\n"})
    split(root / "model", root / "set", 3)
    return root / "set"


@pytest.fixture
def upload_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    root = tmp_path / "upload_hub"
    (root / "org" / "public").mkdir(parents=True)
    (root / "org" / "public" / "README.md").write_bytes(b"# Mine\n")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with UploadHub(root) as hub:
        use_endpoint(monkeypatch, hub.endpoint)
        yield hub


def files_of(hub: UploadHub, repo_id: str, branch: str = "main") -> dict[str, bytes]:
    """What a branch holds, without what the Hub itself puts there."""
    repository = hub.repositories[repo_id]
    files = repository.commits[repository.branches[branch]]
    return {name: file.path.read_bytes() for name, file in files.items() if name != ".gitattributes"}


def without_card(files: dict[str, bytes], card: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != card}


def test_what_was_pushed_can_be_pulled(upload_hub: UploadHub, made: Path, tmp_path: Path) -> None:
    """The repository is made, holds the set and a page about it, and a pull of it gives the same bytes."""
    result = push(made, "org/parts", hub=WRITER)
    files = files_of(upload_hub, "org/parts")
    assert without_card(files, "README.md") == tree(made)
    assert result.card == "README.md"
    commit = upload_hub.repositories["org/parts"].branches["main"]
    assert result.url == f"{upload_hub.endpoint}/org/parts/commit/{commit}"
    assert not upload_hub.repositories["org/parts"].private
    pull(result.place, tmp_path / "out", root_digest=result.root_digest)
    assert tree(tmp_path / "out") == tree(made)
    assert json.loads(json.dumps(result.as_json()))["commit"] == commit


def test_the_page_says_what_it_is_and_how_to_use_it(upload_hub: UploadHub, made: Path) -> None:
    """Metadata for the Hub, the place, the digest, each partition."""
    result = push(made, "org/parts", hub=WRITER)
    card = files_of(upload_hub, "org/parts")["README.md"].decode()
    assert card.startswith("---\nlibrary_name: mmsplit\nbase_model: meta/Base-1B\ntags:\n")
    for needed in (
        f"mmsplit pull org/parts --only 0 -o parts --root {result.root_digest}",
        "mmsplit verify parts --level full",
        "mmsplit merge parts -o parts-merged",
        "at revision `v1`",
        f"{(made / 'partition_1.bin').stat().st_size:,} |",
    ):
        assert needed in card


def test_work_in_progress_never_goes_up(upload_hub: UploadHub, made: Path, tmp_path: Path) -> None:
    """What goes up is what the set manifest lists, whatever else lies there."""
    root = shutil.copytree(made, tmp_path / "set")
    for name in (".mmsplit.lock", "partition_0.bin.partial", "partition_1.bin.journal", "notes.txt", ".git/config"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"secret")
    push(root, "org/parts", hub=WRITER)
    assert without_card(files_of(upload_hub, "org/parts"), "README.md") == tree(made)


def test_a_private_repository(upload_hub: UploadHub, made: Path) -> None:
    """Made private if so asked; one that is public already is refused, before anything is sent."""
    push(made, "user/parts", private=True, hub=WRITER)
    assert upload_hub.repositories["user/parts"].private
    with pytest.raises(RequestError, match="public, and a private one was asked for"):
        push(made, "org/public", private=True, hub=WRITER)
    assert set(files_of(upload_hub, "org/public")) == {"README.md"}


@pytest.mark.parametrize("target", ["org/parts@v2:sets/a", "hf://org/parts@v2:sets/a"])
def test_a_branch_and_a_folder(upload_hub: UploadHub, made: Path, tmp_path: Path, target: str) -> None:
    """The branch is made, main stays as it was, and the folder has a page of its own."""
    result = push(made, target, hub=WRITER)
    assert result.place == "org/parts@v2:sets/a"
    assert files_of(upload_hub, "org/parts") == {}
    files = files_of(upload_hub, "org/parts", "v2")
    assert without_card(files, "sets/a/README.md") == {f"sets/a/{name}": data for name, data in tree(made).items()}
    pull(result.place, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(made)


def test_readmes_of_others_stay(upload_hub: UploadHub, made: Path, other: Path) -> None:
    """The model's belongs to the set, one that people wrote belongs to them; only our own page is replaced."""
    assert push(other, "org/parts", hub=WRITER).card == "PARTITIONS.md"
    files = files_of(upload_hub, "org/parts")
    assert files["README.md"] == b"# The model\n"
    assert files["PARTITIONS.md"].decode().startswith(CARD_MARK)
    assert push(made, "org/public", hub=WRITER).card == "PARTITIONS.md"
    assert files_of(upload_hub, "org/public")["README.md"] == b"# Mine\n"
    assert push(made, "org/own", hub=WRITER).card == "README.md"
    assert push(made, "org/own", hub=WRITER).card == "README.md"


def test_the_same_set_again_sends_nothing(upload_hub: UploadHub, made: Path) -> None:
    """And makes no commit."""
    first = push(made, "org/parts", hub=WRITER)
    upload_hub.received.clear()
    again = push(made, "org/parts", hub=WRITER)
    assert upload_hub.received == []
    assert again.commit == first.commit


def test_another_set_is_refused_and_replaced_on_demand(upload_hub: UploadHub, made: Path, other: Path) -> None:
    """With `force` its partitions go, all in one commit; files that are nobody's stay."""
    push(other, "org/parts", hub=WRITER)
    before = files_of(upload_hub, "org/parts")
    with pytest.raises(RequestError, match="another partition set"):
        push(made, "org/parts", hub=WRITER)
    assert files_of(upload_hub, "org/parts") == before
    push(made, "org/parts", hub=WRITER, force=True)
    files = files_of(upload_hub, "org/parts")
    assert without_card(without_card(files, "README.md"), "PARTITIONS.md") == tree(made)


def test_a_file_of_another_content_is_refused(upload_hub: UploadHub, made: Path) -> None:
    """A repository that holds a model of its own is not overwritten."""
    upload_hub.move_main("org/public", {"config.json": b"{}"})
    with pytest.raises(RequestError, match=r"org/public@main/config\.json: the repository has another file"):
        push(made, "org/public", hub=WRITER)
    upload_hub.move_main("org/public", {"config.json": CAUSAL_CONFIG})
    push(made, "org/public", hub=WRITER)


def test_interrupted_it_sends_what_the_hub_lacks(upload_hub: UploadHub, made: Path) -> None:
    """Nobody sees half a set: what was sent has no name until all is there."""
    upload_hub.refuse_upload_after = 1
    with pytest.raises(NetworkError):
        push(made, "org/parts", hub=WRITER)
    assert files_of(upload_hub, "org/parts") == {}
    assert len(upload_hub.received) == 1
    upload_hub.refuse_upload_after = None
    push(made, "org/parts", hub=WRITER)
    assert len(upload_hub.received) == len(set(upload_hub.received)) == 2
    assert without_card(files_of(upload_hub, "org/parts"), "README.md") == tree(made)


@pytest.mark.parametrize("name", ["partition_1.bin", "partition_0.json", "partition_set.json", "sub/x.txt"])
def test_a_damaged_set_is_not_published(upload_hub: UploadHub, made: Path, tmp_path: Path, name: str) -> None:
    """One flipped bit anywhere, and nothing is made on the Hub."""
    root = shutil.copytree(made, tmp_path / "set")
    flip(root / name, (root / name).stat().st_size // 2)
    with pytest.raises((IntegrityError, FormatError)):
        push(root, "org/parts", hub=WRITER)
    assert "org/parts" not in upload_hub.repositories


def test_a_set_that_is_not_whole_is_not_published(upload_hub: UploadHub, made: Path, tmp_path: Path) -> None:
    """A missing partition, a missing small file, no set at all: nobody is asked anything."""
    root = shutil.copytree(made, tmp_path / "set")
    (root / "partition_1.bin").unlink()
    with pytest.raises(MissingPartitionError, match="partition 1 is not here"):
        push(root, "org/parts", hub=WRITER)
    with pytest.raises(FormatError, match="no partition set here"):
        push(tmp_path, "org/parts", hub=WRITER)
    assert upload_hub.requests == []
    root = shutil.copytree(made, tmp_path / "set2")
    (root / "config.json").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        push(root, "org/parts", hub=WRITER)
    assert "org/parts" not in upload_hub.repositories


@pytest.mark.parametrize(
    ("target", "token", "error", "said"),
    [
        ("org/parts", None, AccessDeniedError, "no token is to be found"),
        ("org/parts", OUTSIDER_TOKEN, AccessDeniedError, "write permission"),
        ("org/public", OUTSIDER_TOKEN, AccessDeniedError, "write permission"),
        ("stranger/parts", MEMBER_TOKEN, AccessDeniedError, "write permission"),
        ("org/parts", "hf_unknownunknownunknownunknownunkn03", AccessDeniedError, "does not accept the token"),
        ("parts", MEMBER_TOKEN, RequestError, "not a model repository"),
        ("./org/parts", MEMBER_TOKEN, RequestError, "not a model repository"),
        ("org/parts:../x", MEMBER_TOKEN, RequestError, "not a folder"),
        ("org/parts@main", MEMBER_TOKEN, None, ""),
    ],
)
def test_who_may_publish_where(
    upload_hub: UploadHub, made: Path, target: str, token: str | None, error: type | None, said: str
) -> None:
    """One clear error that says what to do, and holds no token."""
    hub = HubOptions(token=token)
    if error is None:
        push(made, target, hub=hub)
        return
    with pytest.raises(error, match=said) as caught:
        push(made, target, hub=hub)
    assert token is None or token not in str(caught.value)
    assert set(upload_hub.repositories) == {"org/public"}


def test_the_network_may_be_forbidden(upload_hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE holds here, too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError):
        push(made, "org/parts", hub=WRITER)


def test_a_branch_that_moves_meanwhile_is_not_overwritten(
    upload_hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is made on what was looked at, or not at all; a second run looks again."""
    content = upload_hub.content

    def move(sha256: str) -> Path:
        monkeypatch.setattr(upload_hub, "content", content)
        upload_hub.move_main("org/public", {"news.txt": b"hello"})
        return content(sha256)

    monkeypatch.setattr(upload_hub, "content", move)
    with pytest.raises(NetworkError, match="somebody else has changed the branch"):
        push(made, "org/public", hub=WRITER)
    assert set(files_of(upload_hub, "org/public")) == {"README.md", "news.txt"}
    push(made, "org/public", hub=WRITER)
    assert files_of(upload_hub, "org/public")["news.txt"] == b"hello"


def test_a_file_that_the_hub_leaves_out_is_noticed(upload_hub: UploadHub, made: Path) -> None:
    """A .gitignore there makes the client drop a file without a word."""
    upload_hub.ignored = {"partition_0.json"}
    with pytest.raises(NetworkError, match=r"partition_0\.json.*\.gitignore"):
        push(made, "org/parts", hub=WRITER)


def test_no_secret_is_said(upload_hub: UploadHub, made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither token nor signed address, in the result, in an error, on a stream."""
    upload_hub.refuse_upload_after = 0
    with pytest.raises(NetworkError) as caught:
        push(made, "org/parts", hub=WRITER)
    upload_hub.refuse_upload_after = None
    result: PushResult = push(made, "org/parts", hub=WRITER)
    said = f"{caught.value}{result}" + "".join(capfd.readouterr())
    assert MEMBER_TOKEN not in said
    assert "Signature" not in said
    assert all(hashlib.sha256(data).hexdigest() for data in files_of(upload_hub, "org/parts").values())
