"""The command `vgen dashboards`: configuration for Prometheus, Grafana, Jaeger and W&B, made from `semconv.py`."""
