#!/usr/bin/env python3
"""Renders the conda recipes, builds them into a local channel, installs from it.

    conda.py WORK_FOLDER PYTHON

conda-forge is not asked for anything: WORK_FOLDER/channel gets stand-ins (conda_stubs.yaml) for
what the recipes need from there. The machine's compilers, cmake and ninja build; PYTHON is an
interpreter that has torch, pip and scikit-build-core. So libflash-mla and flash-mla are built as
their recipes say, without CUDA, and pass the recipes' own tests; the CUDA variants are rendered
only.

What is left in WORK_FOLDER/prefix is libflash-mla as a user of conda gets it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import rattler
from rattler_build import (
    PlatformConfig,
    RenderConfig,
    Stage0Recipe,
    ToolConfiguration,
    VariantConfig,
)
from rattler_build.progress import SimpleProgressCallback

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [ROOT / f"recipes/{name}/recipe.yaml" for name in ("libflash-mla", "flash-mla")]
PLATFORMS = ["linux-64", "linux-aarch64"]


def main() -> None:
    work, python = (Path(argument).absolute() for argument in sys.argv[1:])
    channel, prefix = work / "channel", work / "prefix"
    for folder in (channel, prefix, work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)

    variants = VariantConfig.from_file(ROOT / "recipes/variants.yaml")
    for platform in PLATFORMS:
        config = RenderConfig(PlatformConfig(target_platform=platform))
        for recipe in RECIPES:
            for rendered in Stage0Recipe.from_file(recipe).render(variants, config):
                package = rendered.recipe.package
                build = rendered.recipe.build.string
                print(f"{platform}: {package.name} {package.version} {build} {rendered.variant}")

    version = subprocess.check_output(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    os.environ |= {
        "STUB_PYTHON": str(python),
        "STUB_PYTHON_VERSION": version,
        "RATTLER_CACHE_DIR": str(work / "cache"),  # a rebuilt package has its old one's name
    }
    here = {key: values[:1] for key, values in variants.items()} | {"python_min": [version]}
    stubs = ROOT / "ci/conda_stubs.yaml"
    for recipe in [stubs, *RECIPES]:
        built = Stage0Recipe.from_file(recipe).run_build(
            VariantConfig(here),
            ToolConfiguration(test_strategy="native"),
            output_dir=channel,
            channels=[channel.as_uri()],
            progress_callback=None if recipe == stubs else SimpleProgressCallback(),
        )
        for package in [package for result in built for package in result.packages]:
            print(f"built {package.name}, {package.stat().st_size} bytes", flush=True)

    asyncio.run(install(channel, prefix))


async def install(channel: Path, prefix: Path) -> None:
    records = await rattler.solve([channel.as_uri()], ["libflash-mla"])
    await rattler.install(records, prefix)
    print(f"installed {', '.join(map(str, records))} in {prefix}", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # py-rattler 0.28: its threads may need an interpreter that is ending, and abort
