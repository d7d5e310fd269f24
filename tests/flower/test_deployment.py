"""A federation as in the field: a SuperLink with TLS, SuperNodes that authenticate and have their own images, and a server without any."""

from __future__ import annotations

import datetime
import ipaddress
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sklearn.datasets import load_digits

from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import ACCURACY_KEYS, read_summary
from tests.flower.flower_processes import PROGRAMS, end_all, environment_of, free_port

SITES = 2
CONFIG: dict[str, Any] = {
    "study": "deployment",
    "cell": "tls",
    "data": {"name": None, "image": {"channels": 1, "height": 8, "width": 8, "num_classes": 10, "mean": [0.3], "std": [0.38]}},
    "clients": {"count": SITES, "architectures": ["lenet_bn"], "epochs": 2, "attention_samples": 20},
    "student": {"backbone": "lenet_bn"},
    "server": {"rounds": 1, "min_teachers": SITES, "node_wait": 60.0, "timeout": 120.0},
    "method": {"name": "cdfkd_mfs", "epochs": 1, "iterations": 2, "batch_size": 16, "generator": {"latent_dim": 8, "width": 0.125}},
    "engine": {"device": "cpu", "threads": 1, "progress": False},
}


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat) -> None:
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))


def write_certificates(folder: Path) -> None:
    """``ca.crt``, and ``server.pem`` with ``server.key`` for 127.0.0.1, signed by it."""
    now, names = datetime.datetime.now(datetime.UTC), {who: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in ("test CA", "localhost")}
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in names}

    def certificate(who: str, *extensions: tuple[x509.ExtensionType, bool]) -> bytes:
        builder = x509.CertificateBuilder().subject_name(names[who]).issuer_name(names["test CA"]).public_key(keys[who].public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(keys["test CA"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["test CA"].public_key())
    mine = x509.SubjectKeyIdentifier.from_public_key(keys["test CA"].public_key())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)  # a CA: signs certificates
    (folder / "ca.crt").write_bytes(certificate("test CA", (x509.BasicConstraints(True, None), True), (usage, True), (mine, False)))
    addresses = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = (addresses, False), (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False), (issuer, False)
    (folder / "server.pem").write_bytes(certificate("localhost", (x509.BasicConstraints(False, None), True), *server))
    write_key(folder / "server.key", keys["localhost"], serialization.PrivateFormat.TraditionalOpenSSL)


def write_site(folder: Path, site: int) -> None:
    """A SuperNode's key pair, and its images: digits of mostly half of the classes, which no other site has."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_key(folder / f"site{site}", key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"site{site}.pub").write_bytes(public + b"\n")
    digits = load_digits()
    mine = np.flatnonzero((digits.target % SITES == site) & (np.arange(len(digits.target)) < 600))
    pixels, labels = np.rint(digits.images[mine] * (255 / 16)).astype(np.uint8), digits.target[mine]
    np.savez(folder / f"site{site}.npz", x_train=pixels[40:], y_train=labels[40:], x_test=pixels[:40], y_test=labels[:40])


class Federation:
    """A SuperLink and the programs that talk to it; every one has a Flower home and a log file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        write_certificates(folder)
        for name in ("homes", "logs", "empty"):
            (folder / name).mkdir()
        connection = f'[superlink]\ndefault = "tls"\n\n[superlink.tls]\naddress = "127.0.0.1:{self.port}"\nroot-certificates = "{folder / "ca.crt"}"\n'
        self.environment = self._environment("user")
        (folder / "homes" / "user" / "config.toml").write_text(connection)

    def _environment(self, name: str) -> dict[str, str]:
        return environment_of(self.folder / "homes" / name) | {"CDFKD_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def start(self, name: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "logs" / f"{name}.log").open("w") as log:
            command = [str(PROGRAMS / program), *arguments]
            process = subprocess.Popen(command, cwd=self.folder / "empty", env=self._environment(name), stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def end(self) -> None:
        assert end_all(self.folder / "homes") == []
        for process in self.processes:
            process.wait(timeout=10)

    def superlink(self) -> None:
        files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}
        certificates = [f"{option}={self.folder / file}" for option, file in files.items()]
        switches = ("--enable-supernode-auth", "--disable-runtime-dependency-installation", f"--port={self.port}")
        self.start("superlink", "flower-superlink", *certificates, *switches)

    def supernode(self, site: int) -> subprocess.Popen[bytes]:
        mine = self.folder / f"site{site}"
        config = f'partition-id={site} num-partitions={SITES} data-path="{mine}.npz"'
        options = (f"--root-certificates={self.folder / 'ca.crt'}", f"--superlink=127.0.0.1:{self.port}", f"--auth-supernode-private-key={mine}")
        return self.start(f"site{site}", "flower-supernode", *options, f"--port={free_port()}", "--node-config", config)

    def flwr(self, *arguments: str, attempts: int = 1) -> str:
        """What `flwr` prints; a SuperLink that is starting refuses the first attempts."""
        for _ in range(attempts):
            done = subprocess.run(
                [str(PROGRAMS / "flwr"), *arguments], cwd=self.folder / "empty", env=self.environment, capture_output=True, text=True, timeout=200, check=False
            )
            if done.returncode == 0:
                return done.stdout
            time.sleep(0.5)
        raise AssertionError(f"flwr {arguments}: {done.stdout}{done.stderr}\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in sorted((self.folder / "logs").iterdir()))


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    running = Federation(tmp_path)
    yield running
    running.end()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="Flower's processes are found through /proc")
def test_supernodes_with_their_own_images_and_a_server_without_any(federation: Federation, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    federation.superlink()
    for site in range(SITES):
        write_site(tmp_path, site)
        federation.flwr("supernode", "register", str(tmp_path / f"site{site}.pub"), "tls", attempts=60)
        federation.supernode(site)
    write_site(tmp_path, SITES)  # a key that nobody registered
    stranger = federation.supernode(SITES)
    log = federation.flwr("run", str(repository), "tls", "--stream", "--run-config", f'config="{tmp_path / "run.yaml"}" out="{out}"')
    runs = json.loads(federation.flwr("list", "tls", "--format", "json"))["runs"]
    assert [run["status"] for run in runs] == ["finished:completed"], log + federation.logs()

    summary = read_summary(out)
    assert summary["finished"]
    (record,) = summary["rounds"]
    assert record["accuracy"] == dict.fromkeys(ACCURACY_KEYS)  # no images at the server, so nothing to test on
    assert record["bytes"]["up"] > 0
    student = load_student(out)
    assert (student.student.heads, student.image.num_classes, student.image.mean) == (SITES, 10, (0.3,))
    assert stranger.wait(timeout=60) != 0, federation.logs()
    assert sorted(path.stem for path in (out / "uploads").glob("[0-9]*.json")) == [str(site) for site in range(SITES)]
    uploads = [json.loads((out / "uploads" / f"{site}.json").read_text()) for site in range(SITES)]
    for site, upload in enumerate(uploads):
        with np.load(tmp_path / f"site{site}.npz") as images:
            assert upload["num_examples"] == len(images["y_train"])  # all of its own images, no share of anybody's
    state = json.loads((out / "state.json").read_text())
    assert (state["phase"], state["rounds"][0]["quarantined"]) == ("evaluated", {})
    assert {"student-accuracy", "teacher-accuracy"} <= set(state["rounds"][0]["evaluate_clients"])
