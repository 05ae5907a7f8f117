"""The engines that generate. Each file imports its own backend; nothing here knows a trainer."""
