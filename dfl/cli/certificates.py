"""dfl certificates RUN --peers N: a small authority for a trial over zenoh, and a certificate for each process."""

from dfl.cli.paths import path

HELP = "make a small authority and a certificate for each process of a run with membership.transport: zenoh, for a trial"


def add(parser) -> None:
    parser.add_argument("run", type=path, help="the run's folder; the files come into its folder certificates")
    parser.add_argument("--peers", type=int, required=True, metavar="N", help="one for each of so many processes, at least one")
    parser.add_argument("--days", type=int, default=90, help="how long they are valid (90)")


def run(args, overrides: list[str]) -> int:
    from dfl.transport.certificates import make
    for option, value in (("--peers", args.peers), ("--days", args.days)):
        if not 0 < value <= 10_000:
            raise ValueError(f"{option} {value} is not allowed; allowed: 1 to 10000")
    folder = args.run / "certificates"
    make(folder, args.peers, args.days)
    print(f"""{folder}: an authority for a trial and {args.peers} certificates, valid for {args.days} days
copy to the machine of process K, into RUN/certificates or where DFL_CERTIFICATES says:
  authority.pem  process-K.pem  process-K.key
never copy the key of another process. authority.key can make more certificates: keep it where nobody else is, or remove it.""")
    return 0
