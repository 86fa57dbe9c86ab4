"""Native versus retrofitted sparse attention: models, methods, schedules, training, evaluation, report."""
