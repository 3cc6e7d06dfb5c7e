"""The only place that knows Prefect and DVC's API. It holds no value and no algorithm: flows."""
