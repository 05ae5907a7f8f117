"""What Prometheus, Grafana, Jaeger and W&B need to show vgen, made from `names.py`: `vgen dashboards DIR`."""
