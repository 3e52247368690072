"""A small authority for a trial: whom it vouches for, who may read its keys, and that nothing is written over."""

import datetime
import shutil
import stat

import pytest

pytest.importorskip("cryptography", reason="needs cryptography: pip install 'dfl[zenoh]'")

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from dfl.cli import main
from dfl.transport.certificates import identity_of, make, read_identity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "wide"
    assert main(["certificates", str(run), "--peers", "3", "--days", "5"]) == 0
    return run


def read(path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_each_certificate_names_its_process_and_is_signed_by_the_authority(run):
    authority = read(run / "certificates" / "authority.pem")
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    now, numbers = datetime.datetime.now(datetime.timezone.utc), set()
    for process in range(3):
        files = identity_of(run / "certificates", process)
        certificate = read(files.certificate)
        certificate.verify_directly_issued_by(authority)
        [name] = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        assert name.value == f"process-{process}"
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca  # it makes no others
        key = load_pem_private_key(files.key.read_bytes(), None)
        assert key.public_key() == certificate.public_key()
        days = (certificate.not_valid_after_utc - now) / datetime.timedelta(days=1)
        assert 4.9 < days <= 5
        assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=23)  # a clock may be hours behind
        numbers.add((certificate.serial_number, key.private_numbers().private_value))
    assert len(numbers) == 3


def test_nobody_else_reads_a_key(run):
    folder = run / "certificates"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*.key")} == {0o600}
    assert len(list(folder.glob("*.key"))) == 4 and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_key_that_others_may_read_is_refused(tmp_path):
    make(tmp_path, 1)
    read_identity(tmp_path, 0)
    (tmp_path / "process-0.key").chmod(0o640)
    with pytest.raises(ValueError, match="process-0.key' may be read by others; allowed: mode 600"):
        read_identity(tmp_path, 0)


WRONG = {"another's": "it names process-1; needed: process-0", "another's key": "process-0.key is not its key",
         "another authority's": "authority.pem has not signed it", "old": "it is valid from .* to .*, and today is",
         "no PEM": "it, its key or authority.pem is no PEM"}


@pytest.mark.parametrize("what", WRONG)
def test_a_certificate_that_the_others_would_not_take_is_refused_at_the_start(run, tmp_path, what):
    ours, other = tmp_path / "ours", tmp_path / "other"
    shutil.copytree(run / "certificates", ours)
    make(other, 1, days=0 if what == "old" else 5)
    if what == "another's":
        for suffix in ("pem", "key"):
            shutil.copy2(ours / f"process-1.{suffix}", ours / f"process-0.{suffix}")
    elif what == "another's key":
        shutil.copy2(ours / "process-1.key", ours / "process-0.key")
    elif what == "another authority's":
        shutil.copy2(other / "authority.pem", ours / "authority.pem")
    elif what == "old":
        ours = other
    else:
        (ours / "process-0.pem").write_text("none")
    with pytest.raises(ValueError, match=f"process-0.pem': {WRONG[what]}"):
        read_identity(ours, 0)


def test_nothing_is_written_over(run, capsys):
    before = {path.name: path.read_bytes() for path in (run / "certificates").iterdir()}
    capsys.readouterr()
    assert main(["certificates", str(run), "--peers", "8"]) == 2
    assert "holds authority.pem, authority.key, process-0.pem already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "certificates").iterdir()} == before


def test_it_says_what_goes_where(tmp_path, capsys):
    assert main(["certificates", str(tmp_path / "run"), "--peers", "2"]) == 0
    said = capsys.readouterr().out
    assert "authority.pem  process-K.pem  process-K.key" in said and "for a trial" in said
    assert "never copy the key of another process" in said


@pytest.mark.parametrize("words", [["--peers", "0"], ["--peers", "2", "--days", "-1"]])
def test_numbers_that_are_none_are_refused(tmp_path, words, capsys):
    assert main(["certificates", str(tmp_path / "run"), *words]) == 2
    assert "allowed: 1 to 10000" in capsys.readouterr().err and not (tmp_path / "run").exists()
