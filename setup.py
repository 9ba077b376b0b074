"Packaging shim: every value comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path
import re
import shlex
import sys

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.install import install

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stubs import write_stubs

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
words = lambda key: shlex.split(cfg.get(key) or '')
EXTRAS = 'lab', 'widgets', 'site'
licences = dict(apache2='Apache-2.0', mit='MIT', bsd3='BSD-3-Clause')


def readme():
    "README.md with addresses that hold outside the repository."
    text, top = Path('README.md').read_text(encoding='utf-8'), r'(?!https?:|#)'
    text = re.sub(rf'(!\[[^\]]*\]\(){top}', rf"\g<1>{cfg['git_url']}/raw/{cfg['branch']}/", text)
    return re.sub(rf'(?<!!)(\[[^\]]*\]\(){top}', rf"\g<1>{cfg['git_url']}/blob/{cfg['branch']}/", text)


class Build(build_py):
    "Puts the signatures for type checkers into the wheel; an editable install has the sources only."
    def run(self):
        super().run()
        if not self.editable_mode: write_stubs(cfg['lib_path'], Path(self.build_lib) / cfg['lib_path'])


class Install(install):
    "Takes the folder of the interpreter as it is, also where its name holds what looks like a variable, `$x` or `{x}`."
    def expand_basedirs(self): pass


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    license=licences.get(cfg['license'], cfg['license']), license_files=['LICENSE'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    package_dir={'': '.'},   # an editable install then is one folder on the path, which type checkers read too
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), include_package_data=True,
    package_data={cfg['lib_path']: ['py.typed', '__init__.pyi']}, cmdclass={'build_py': Build, 'install': Install},
    install_requires=words('requirements'), extras_require={'dev': [word for name in (*EXTRAS, 'dev') for word in words(f'{name}_requirements')],
                    **{name: words(f'{name}_requirements') for name in EXTRAS}},
    python_requires='>=' + cfg['min_python'],
    long_description=readme(), long_description_content_type='text/markdown',
    classifiers=['Intended Audience :: ' + cfg['audience'], 'Typing :: Typed', 'Programming Language :: Python :: 3',
                 *(f'Programming Language :: Python :: {version}' for version in words('pythons'))],
    entry_points={'console_scripts': words('console_scripts'),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False)
