"""Quality at equal bytes: tasks, the run over a grid of methods and budgets, and its report."""
