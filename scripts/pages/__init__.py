"""The parts of scripts/site.py and of scripts/watch.py --web: what pages say, their figures and templates.

    board.py      the leaderboard             compare.py   any two scripts, symbol by symbol
    record.py     a page a record             ladders.py   curves, differences by compute, verdicts
    negative.py   what did not help           figures.py   plots as SVG        prose.py   Markdown as HTML
    build.py      all of it into one folder   templates/   Jinja2              static/    CSS and JavaScript

A module makes plain dictionaries for its template. Numbers come from the functions that write the README's
tables, never from a second reading of the files.
"""
