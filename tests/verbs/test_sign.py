"""Signatures: ours are accepted by the library's own command and its by us, and nothing else is."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, flip, llama_weights, tree, write_checkpoint

from mmsplit.cli import run
from mmsplit.errors import FormatError, IntegrityError, MissingExtraError, OutputExistsError, RequestError
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.sign import sign
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify


def test_without_the_library_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever signs nothing needs nothing of it; whoever does is told what to install."""
    write_checkpoint(tmp_path / "model", [llama_weights(1)])
    split(tmp_path / "model", tmp_path / "set", 1)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert verify(tmp_path / "set").ok
    with pytest.raises(MissingExtraError, match=r"pip install 'mmsplit\[sign\]'"):
        sign(tmp_path / "set", tmp_path / "key.pem")
    with pytest.raises(MissingExtraError, match=r"pip install 'mmsplit\[sign\]'"):
        verify(tmp_path / "set", signature=tmp_path / "s", public_key=tmp_path / "key.pub")
    assert run(["sign", str(tmp_path / "set"), "--key", str(tmp_path / "key.pem")]) == 8


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of keys: `alice`, `mallory`, `sealed` (with a password), and `rsa`, which is of no use."""
    pytest.importorskip("model_signing", reason="needs the extra 'sign'")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory", "sealed", "rsa"):
        key = rsa.generate_private_key(65537, 2048) if name == "rsa" else ec.generate_private_key(ec.SECP256R1())
        seal: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if name == "sealed":
            seal = serialization.BestAvailableEncryption(b"open sesame")
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, seal)
        (folder / f"{name}.pem").write_bytes(private)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A set in two partitions."""
    write_checkpoint(tmp_path / "model", [llama_weights(2)], files={"config.json": CAUSAL_CONFIG})
    split(tmp_path / "model", tmp_path / "set", 2)
    return tmp_path / "set"


def library(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the library's own command."""
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def root_of(root: Path) -> str:
    digest: str = json.loads((root / SET_MANIFEST_NAME).read_bytes())["root_digest"]
    return digest


def test_a_signature_stands_for_the_root(made: Path, keys: Path) -> None:
    """What is verified by it is held to digests, as with the root itself; a partition needs no other."""
    before = tree(made)
    result = sign(made, keys / "alice.pem")
    assert result == (made / "partition_set.json.sig", root_of(made))
    assert {name for name in tree(made) if name not in before} == {"partition_set.json.sig"}
    found = verify(made, signature=result.path, public_key=keys / "alice.pub")
    assert (found.ok, found.root_digest) == (True, root_of(made))
    for name in ("partition_0.json", "partition_0.bin"):
        (made / name).unlink()
    found = verify(made / "partition_1.json", signature=result.path, public_key=keys / "alice.pub")
    assert (found.ok, found.root_digest) == (True, root_of(made))
    flip(made / "partition_1.bin", 4096)
    assert not verify(made / "partition_1.json", signature=result.path, public_key=keys / "alice.pub").ok


@pytest.mark.parametrize("every_file", [False, True])
def test_the_library_accepts_ours(made: Path, keys: Path, every_file: bool) -> None:
    """Of the set manifest alone where it is told to ignore the rest; of every file as it is, until one is changed."""
    signature = sign(made, keys / "alice.pem", every_file=every_file).path
    words = ["verify", "key", made, "--signature", signature, "--public_key", keys / "alice.pub"]
    plain = library(*words)
    assert (plain.returncode == 0) == every_file, plain.stderr
    assert every_file or "Extra files" in plain.stderr
    assert library(*words, "--ignore_unsigned_files").returncode == 0
    flip(made / "partition_1.bin", 4096)
    assert (library(*words, "--ignore_unsigned_files").returncode == 0) != every_file


def test_ours_accepts_the_librarys(made: Path, keys: Path, tmp_path: Path) -> None:
    """A signature made by its command over the whole directory; damage is found, whoever finds it first."""
    signature = tmp_path / "model.sig"
    assert library("sign", "key", made, "--private_key", keys / "alice.pem", "--signature", signature).returncode == 0
    assert verify(made, signature=signature, public_key=keys / "alice.pub").root_digest == root_of(made)
    flip(made / "partition_0.bin", 4096)
    with pytest.raises(IntegrityError, match=r"signature is not right: Signature mismatch.*partition_0\.bin"):
        verify(made, signature=signature, public_key=keys / "alice.pub")


def test_a_sealed_key(made: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its password comes from a file, not from the command line, where others could see it."""
    with pytest.raises(RequestError, match="key cannot be used"):
        sign(made, keys / "sealed.pem")
    with pytest.raises(RequestError, match="key cannot be used"):
        sign(made, keys / "sealed.pem", password="wrong")
    (tmp_path / "password").write_text("open sesame\n")
    words = ["sign", str(made), "--key", str(keys / "sealed.pem"), "-o", str(tmp_path / "out.sig")]
    assert run([*words, "--password-file", str(tmp_path / "missing")]) == 2
    assert run([*words, "--password-file", str(tmp_path / "password")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.sig'}\nsigned: root digest {root_of(made)}\n"
    words = ["verify", str(made), "--signature", str(tmp_path / "out.sig"), "--key", str(keys / "sealed.pub")]
    assert run(words) == 0
    assert root_of(made) in capsys.readouterr().out


def test_why_a_key_is_refused(made: Path, keys: Path, tmp_path: Path) -> None:
    """In words of ours: no name of a class, no errno, and what to do."""

    def refusal(name: str, password: str | None = None) -> str:
        with pytest.raises(RequestError) as caught:
            sign(made, keys / name, password=password)
        return str(caught.value).partition("key cannot be used: ")[2]

    assert refusal("rsa.pem").startswith("it is no key of an elliptic curve. Give a PEM file with a key of curve P-256")
    assert refusal("nobody.pem").startswith("No such file or directory. Give")
    assert refusal("sealed.pem").startswith("it is encrypted. Give its password: --password-file FILE")
    assert refusal("sealed.pem", "wrong").startswith("its password is not right. Check")
    assert refusal("alice.pem", "needless").startswith("it is not encrypted, and a password is given. Leave")
    assert "?." not in refusal("alice.pub") + refusal("mallory.pub")
    signature = sign(made, keys / "alice.pem").path
    with pytest.raises(IntegrityError, match=r"match the provided public key\. Check the key\."):
        verify(made, signature=signature, public_key=keys / "mallory.pub")
    with pytest.raises(RequestError, match=r"No such file or directory\. Give"):
        verify(made, signature=signature, public_key=keys / "nobody.pub")


def test_what_is_refused(made: Path, keys: Path, tmp_path: Path) -> None:
    """Other keys, other sets, other files, other roots: errors, and none is taken for a smaller fault."""
    signature = sign(made, keys / "alice.pem").path
    for key, error in (("mallory.pub", IntegrityError), ("rsa.pub", RequestError), ("alice.pem", RequestError),
                       ("nobody.pub", RequestError)):  # fmt: skip
        with pytest.raises(error):
            verify(made, signature=signature, public_key=keys / key)
    with pytest.raises(RequestError, match="key cannot be used"):
        sign(made, keys / "rsa.pem", force=True)
    with pytest.raises(IntegrityError, match="signature is of another set"):
        verify(made, signature=signature, public_key=keys / "alice.pub", root_digest="0" * 64)
    with pytest.raises(RequestError, match="go together"):
        verify(made, signature=signature)
    with pytest.raises(RequestError, match="go together"):
        verify(made, public_key=keys / "alice.pub")
    with pytest.raises(OutputExistsError, match="signature exists already"):
        sign(made, keys / "alice.pem")
    with pytest.raises(RequestError, match="one partition is not signed"):
        sign(made / "partition_0.json", keys / "alice.pem")
    with pytest.raises(FormatError, match="no partition set here"):
        sign(tmp_path / "model", keys / "alice.pem")
    with pytest.raises(FormatError, match="cannot be read"):
        verify(made, signature=tmp_path / "no.sig", public_key=keys / "alice.pub")
    # A signature that is right, but not of a set.
    other = tmp_path / "other.sig"
    assert (
        library("sign", "key", tmp_path / "model", "--private_key", keys / "alice.pem", "--signature", other).returncode
        == 0
    )
    shutil.copyfile(tmp_path / "model" / "model.safetensors", made / "model.safetensors")
    with pytest.raises(IntegrityError, match="does not list partition_set"):
        verify(made, signature=other, public_key=keys / "alice.pub")


def test_any_change_of_a_signature_or_of_what_it_signs_is_refused(made: Path, keys: Path) -> None:
    """Whatever a signature file holds, what comes is our error or the root that was signed."""
    path = sign(made, keys / "alice.pem").path
    genuine = path.read_bytes()
    bundle = json.loads(genuine)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    forged = json.loads(payload)
    forged["predicate"]["resources"][0]["digest"] = "0" * 64
    hostile = [b"", b"{}", b"[]", b"null", b"[" * 100_000, genuine[:-10], b"\xff" * 50, genuine.replace(b"sig", b"gis")]
    for text in (payload[:-1], json.dumps(forged).encode(), b"{}"):
        changed = json.loads(genuine)
        changed["dsseEnvelope"]["payload"] = base64.b64encode(text).decode()
        hostile.append(json.dumps(changed).encode())
    for data in hostile:
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="signature is not right"):
            verify(made, signature=path, public_key=keys / "alice.pub")
    path.write_bytes(genuine)
    values = json.loads((made / SET_MANIFEST_NAME).read_bytes())
    (made / SET_MANIFEST_NAME).write_text(json.dumps(values))  # the same root, but not the bytes that were signed
    with pytest.raises(IntegrityError, match="signature is not right"):
        verify(made, signature=path, public_key=keys / "alice.pub")
