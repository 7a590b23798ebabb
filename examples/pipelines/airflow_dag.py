"""A step of an Airflow DAG: the pod writes result.json where Airflow reads the task's return value (XCom)."""

from datetime import datetime

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG

with DAG(dag_id="penstock", start_date=datetime(2026, 1, 1), schedule=None, catchup=False):
    # a retry goes on from the newest checkpoint; 75 says that the pod was stopped with one
    train = KubernetesPodOperator(
        task_id="train",
        image="registry.example.com/penstock:0.1.0",
        cmds=["penstock"],
        arguments=["train", "s3://my-bucket/papers.graph", "--run-dir", "s3://my-bucket/runs/papers"]
        + ["--stage-dir", "/tmp/stage", "--host-memory", "24GiB", "--epochs", "20"]
        + ["--result-json", "/airflow/xcom/return.json"],
        do_xcom_push=True,
        container_resources={"requests": {"cpu": "8", "memory": "32Gi"}, "limits": {"memory": "32Gi"}},
        security_context={"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001},
        termination_grace_period=120,
        retries=3,
    )
    infer = KubernetesPodOperator(
        task_id="infer",
        image="registry.example.com/penstock:0.1.0",
        cmds=["penstock"],
        arguments=["infer", "s3://my-bucket/runs/papers", "s3://my-bucket/papers.parquet"],
        security_context={"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001},
    )
    train >> infer
