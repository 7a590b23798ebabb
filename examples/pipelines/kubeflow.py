"""A step of a Kubeflow pipeline: `python kubeflow.py` writes penstock.yaml for upload (kfp 2)."""

from kfp import compiler, dsl

IMAGE = "registry.example.com/penstock:0.1.0"


@dsl.container_component
def train(dataset: str, run_dir: str, epochs: int, lr: float, result: dsl.OutputPath(str)):
    """Train; a step that is tried again goes on from its newest checkpoint, since `run_dir` outlives the pod."""
    return dsl.ContainerSpec(
        image=IMAGE,
        command=["penstock", "train", dataset],
        args=["--run-dir", run_dir, "--epochs", epochs, "--lr", lr, "--stage-dir", "/tmp/stage"]
        + ["--host-memory", "24GiB", "--result-json", result],
    )


@dsl.container_component
def infer(run_dir: str, out: str, result: str):
    """Write embeddings and predictions; `result` is there to run after training."""
    return dsl.ContainerSpec(
        image=IMAGE, command=["sh", "-ec", 'penstock infer "$0" "$1"'], args=[run_dir, out, result]
    )


@dsl.pipeline(name="penstock")
def pipeline(
    dataset: str = "s3://my-bucket/papers.graph",
    run_dir: str = "s3://my-bucket/runs/papers",
    out: str = "s3://my-bucket/papers.parquet",
    epochs: int = 20,
    lr: float = 0.003,
):
    trained = train(dataset=dataset, run_dir=run_dir, epochs=epochs, lr=lr)
    trained.set_cpu_limit("8").set_memory_limit("32G").set_retry(3)
    infer(run_dir=run_dir, out=out, result=trained.outputs["result"]).set_cpu_limit("8").set_memory_limit("32G")


if __name__ == "__main__":
    compiler.Compiler().compile(pipeline, "penstock.yaml")
