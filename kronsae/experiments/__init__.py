"""The paper's statements, checked: `python -m kronsae.experiments NAME`.

An experiment is a module here, named as on the command line, that holds
    FIGURE, STATEMENT        what of the paper it checks: a figure or table, and its statement, or
                             what it asks where the paper's answer is a picture alone
    Settings                 frozen dataclass of `kronsae.config.setting`s: its flags and defaults
    SMALLEST, PAPER          settings for a run of seconds, and for one of the paper's size
    cells(settings, runs)    the runs it wants, each a dict of JSON values, as far as is known now
    prepare(settings)        what its runs share, made once, if there is anything left to run
    run(settings, prepared, cell)   the figures of one run (a dict of JSON values)
    conclude(settings, runs)        `Conclusion`: a table, and ours in a line beside the paper's
    draw(settings, runs, path)      a picture
`kronsae.experiments.common` does the rest: the grid, its file, resuming it.
"""

NAMES = (
    *("toy", "correlation", "composition", "heads"),
    *("isoflop", "layers", "sparsity", "jumprelu", "convergence"),
)
"""Experiments, in the order to list them; each is a module of this package."""
