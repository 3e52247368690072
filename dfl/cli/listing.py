"""dfl list: every name that a recipe may use."""

HELP = "every method, topology, slot of a round, task, metric and partition"


def add(parser) -> None:
    pass


def run(args, overrides: list[str]) -> int:
    import topologies
    from dfl import extensions, methods, partition, tasks
    from dfl.metrics.choice import describe as metrics
    extensions.load()
    slots = [(f"{slot}s", methods.describe_slot(slot)) for slot in methods.SLOTS]
    for kind, table in (("methods (rule in a recipe)", methods.describe()), ("topologies", topologies.describe()), *slots,
                        ("tasks", tasks.describe()), ("data sources", tasks.describe(tasks.SOURCES)),
                        ("metrics (eval.metrics in a recipe)", metrics()), ("partitions", partition.describe())):
        print(f"{kind}:")
        width = max(map(len, table))
        for name, line in table.items():
            print(f"  {name.ljust(width)}  {line}")
    return 0
