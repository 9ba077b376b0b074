"""Pin what `settings.ini` asks for: `make lock`, or in newest versions `make lock UPGRADE=all` (or `UPGRADE="numpy scipy"`).

uv resolves for all Pythons and systems at once. `constraints.txt` gets every version, `requirements.lock` also the hashes of the
files on PyPI. torch and what only its CUDA builds bring are not in the lock: which file is right depends on the machine. torch keeps
its version, unless another is named: `make lock TORCH=2.14.0`.
"""
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS, LOCK = ROOT / 'constraints.txt', ROOT / 'requirements.lock'
TORCH = re.compile(r'(torch|triton|(nvidia|cuda)-[a-z0-9-]+)==')
ABOUT = ('# Versions the tests run with. Written by `make lock`; what is needed stands in settings.ini.\n',
         '# The versions of constraints.txt, without torch (its file depends on the machine), with hashes. Written by `make lock`.\n')


def asked():
    "The lines of settings.ini that require packages, one package a line."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return '\n'.join(word for key in ('requirements', 'lab_requirements', 'widgets_requirements', 'site_requirements', 'dev_requirements') for word in ini['DEFAULT'][key].split())


def resolve(folder, upgrade, torch):
    "The requirements, with markers and hashes, as uv writes them. Versions of today stay where they still serve, unless in `upgrade`."
    out, held = folder / 'resolved.txt', folder / 'held.txt'
    out.write_text(CONSTRAINTS.read_text(encoding='utf-8'), encoding='utf-8')
    held.write_text(f'torch=={torch}\n', encoding='utf-8')
    newer = ['--upgrade'] if upgrade == ['all'] else [word for name in upgrade for word in ('--upgrade-package', name)]
    subprocess.run([sys.executable, '-m', 'uv', '--quiet', 'pip', 'compile', '-', '--universal', '--python-version=3.11', '--generate-hashes',
                    '--only-binary=:all:', '--no-annotate', '--no-header', f'--constraints={held}', f'--output-file={out}', *newer],
                   cwd=folder, input=asked(), text=True, check=True)
    return out.read_text(encoding='utf-8')


def entries(text):
    "Each requirement with the lines of its hashes."
    return re.findall(r'^[a-z0-9][^\n]*\n(?:    [^\n]*\n)*', text, re.M)


def main(upgrade):
    torch = os.environ.get('TORCH') or re.search(r'^torch==(\S+)', CONSTRAINTS.read_text(encoding='utf-8'), re.M)[1]
    with TemporaryDirectory() as folder: found = entries(resolve(Path(folder), upgrade, torch))
    pins = [entry.splitlines()[0].removesuffix(' \\') + '\n' for entry in found]
    CONSTRAINTS.write_text(ABOUT[0] + ''.join(pins), encoding='utf-8')
    LOCK.write_text(ABOUT[1] + ''.join(entry for entry in found if not TORCH.match(entry)), encoding='utf-8')


if __name__ == '__main__': main(sys.argv[1:])
