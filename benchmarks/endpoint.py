"""An S3 endpoint on the loopback: moto's server in a process of its own, filled from a folder."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

BUCKET = "bench"
_SERVE = """
import sys, time
from moto.server import ThreadedMotoServer
import logging; logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("PORT", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class Endpoint:
    """Serves until it is left: ``with Endpoint() as endpoint: ...``."""

    def __enter__(self) -> Endpoint:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        begin = time.monotonic()
        while True:
            line = self.process.stdout.readline()
            if line.startswith("PORT"):
                break
            if not line or time.monotonic() - begin > 60:
                raise RuntimeError(
                    "moto's server did not start; it is in the extra: pip install 'midstream[bench]'"
                )
        self.address = f"http://127.0.0.1:{line.split()[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.terminate()
        self.process.wait()

    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "S3_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def upload(self, folder: Path, prefix: str) -> str:
        """Put a folder's files there; their URL."""
        import boto3

        names = {"endpoint_url": self.address, "region_name": "us-east-1"}
        client = boto3.client("s3", aws_access_key_id="none", aws_secret_access_key="none", **names)
        if BUCKET not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        for path in sorted(folder.iterdir()):
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
        return f"s3://{BUCKET}/{prefix}"
