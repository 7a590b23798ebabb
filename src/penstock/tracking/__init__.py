"""Where numbers of a run go beside `metrics.jsonl`: TensorBoard, MLflow, W&B, behind one small interface."""
