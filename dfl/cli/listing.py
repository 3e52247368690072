"""dfl list: every name that a recipe may use."""

HELP = "every rule, topology, codec, task and partition"


def add(parser) -> None:
    pass


def run(args, overrides: list[str]) -> int:
    import topologies
    from dfl import codecs, partition, rules, tasks
    for kind, table in (("rules", rules.describe()), ("topologies", topologies.describe()), ("codecs", codecs.describe()),
                        ("tasks", tasks.describe()), ("data sources", tasks.describe(tasks.SOURCES)),
                        ("partitions", partition.describe())):
        print(f"{kind}:")
        width = max(map(len, table))
        for name, line in table.items():
            print(f"  {name.ljust(width)}  {line}")
    return 0
