"""What tests share: fakes, real services, small models, and the scripts that worker processes run."""
