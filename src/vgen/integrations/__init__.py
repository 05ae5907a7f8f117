"""The one place where other trainers' own shapes live."""
