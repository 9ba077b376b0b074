"""What each package that `lap_nb` needs costs: `python tests/dependencies.py` renews the numbers in
.github/MAINTAINING.md.

Import: processor seconds that a fresh Python with one thread takes for the modules that `lap_nb` imports from the
package, less those of an empty one; the smallest of five. What a package imports in turn is counted with it. Size: the
files of the package alone."""
import os
import re
import resource
import shlex
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, version

from conftest import ROOT

GUIDE = ROOT / '.github' / 'MAINTAINING.md'
# What `lap_nb` imports from a package, where that is not the package by its own name
MODULES = {
    'POT': 'ot', 'scikit-learn': 'sklearn.datasets', 'scipy': 'scipy.optimize, scipy.spatial.distance, scipy.stats',
    'pillow': 'PIL.Image', 'matplotlib': 'matplotlib.pyplot', 'tqdm': 'tqdm.auto', 'lazy-loader': 'lazy_loader',
    'dask': 'dask', 'voila': 'voila.app', 'fastcore': 'fastcore.basics, fastcore.meta, fastcore.script'}
ROW = re.compile(r'^\| ([\w-]+) \| (.*?) \| [\d.]+ s \| [\d.]+ MB \|$', re.M)


def required():
    "Names of the packages in settings.ini that `lap_nb` and its extras for users need."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    asked = ' '.join(ini['DEFAULT'][key] for key in ('requirements', 'lab_requirements', 'widgets_requirements'))
    return list(dict.fromkeys(re.match(r'[\w-]+', word)[0] for word in shlex.split(asked)))


def processor_seconds(code):
    "The smallest processor time of five fresh processes that run `code`."
    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, '-c', code],
            check=True,
            env=dict(os.environ, OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1'),
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return min(once() for _ in range(5))


def megabytes(package):
    "Size of the installed files of `package`, compiled ones apart."
    files = (f.locate() for f in distribution(package).files if f.suffix != '.pyc')
    return sum(os.path.getsize(f) for f in files if os.path.exists(f)) / 1e6


def main():
    text, empty = GUIDE.read_text(encoding='utf-8'), processor_seconds('pass')
    def measured(row):
        package, why = row.groups()
        seconds = max(0., processor_seconds(f'import {MODULES.get(package, package)}') - empty)
        print(f'{package} {version(package)}: {seconds:.2f} s, {megabytes(package):.1f} MB', flush=True)
        return f'| {package} | {why} | {seconds:.2f} s | {megabytes(package):.1f} MB |'
    GUIDE.write_text(ROW.sub(measured, text), encoding='utf-8')


if __name__ == '__main__': main()
