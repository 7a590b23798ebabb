"""A step of a Flyte workflow: inputs and outputs are values; the run folder is a URI, so that retries go on from it."""

from flytekit import ContainerTask, Resources, kwtypes, workflow

train = ContainerTask(
    name="penstock-train",
    image="registry.example.com/penstock:0.1.0",
    input_data_dir="/var/inputs",
    output_data_dir="/var/outputs",
    inputs=kwtypes(dataset=str, run_dir=str, epochs=int),
    outputs=kwtypes(result=str),
    requests=Resources(cpu="8", mem="32Gi"),
    command=["penstock", "train", "{{.inputs.dataset}}", "--run-dir", "{{.inputs.run_dir}}"]
    + ["--epochs", "{{.inputs.epochs}}", "--stage-dir", "/tmp/stage", "--host-memory", "24GiB"]
    + ["--result-json", "/var/outputs/result"],
)


@workflow
def penstock(
    dataset: str = "s3://my-bucket/papers.graph", run_dir: str = "s3://my-bucket/runs/papers", epochs: int = 20
) -> str:
    return train(dataset=dataset, run_dir=run_dir, epochs=epochs)
