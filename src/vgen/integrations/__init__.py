"""Adapters to other trainers: one module for each, and the only place in vgen that names one."""
