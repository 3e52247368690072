"""dfl list: every name that a recipe may use."""

HELP = "every method, topology, slot of a round, adapter, task, metric and partition"


def add(parser) -> None:
    pass


def run(args, overrides: list[str]) -> int:
    import topologies
    from dfl import extensions, methods, partition, tasks
    from dfl.adapters import kinds
    from dfl.metrics.choice import describe as metrics
    extensions.load()
    named = {name: f"{line}\n{'':4}{methods.filled_by(name)}" for name, line in methods.describe().items()}
    slots = [(f"{slot}s ({slot} in a recipe)", methods.describe_slot(slot)) for slot in methods.SLOTS]
    for kind, table in (("methods (method in a recipe), and the slots that each fills", named),
                        ("topologies", topologies.describe()), *slots, ("adapters (lora.adapter)", kinds.describe()),
                        ("tasks", tasks.describe()),
                        ("data sources", tasks.describe(tasks.SOURCES)),
                        ("metrics (eval.metrics in a recipe)", metrics()), ("partitions", partition.describe())):
        print(f"{kind}:")
        width = max(map(len, table))
        for name, line in table.items():
            print(f"  {name.ljust(width)}  {line}")
    return 0
