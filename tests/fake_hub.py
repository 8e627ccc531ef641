"""The few answers of the Hugging Face Hub that reading one dataset repository takes, from a folder."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = '1' * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *arguments):
        self.server.requests.append(f'{self.command} {self.path} {self.headers.get("Range", "")}')

    def entry(self, path):
        content = (self.server.folder / path).read_bytes()
        return {'type': 'file', 'path': path, 'size': len(content), 'oid': hashlib.sha1(content).hexdigest()}

    def answer(self, status, body=b'', length=None, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.split('?')[0])
        folder = self.server.folder
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())
        api, resolve = f'/api/datasets/{self.server.repo}', f'/datasets/{self.server.repo}/resolve/'
        if re.fullmatch(api + r'(/revision/[^/]+)?', path):
            siblings = [{'rfilename': name} for name in files]
            state = {
                'private': False,
                'gated': False,
                'disabled': False,
                'tags': [],
                'downloads': 0,
                'likes': 0,
            }
            self.answer(
                200, {'_id': '0', 'id': self.server.repo, 'sha': COMMIT, 'siblings': siblings, **state}
            )
        elif tree := re.fullmatch(api + r'/tree/[^/]+/?(.*)', path):
            self.answer(200, self.tree(tree[1], files, 'recursive=true' in self.path.lower()))
        elif path.startswith(resolve) and (name := path.removeprefix(resolve).split('/', 1)[1]) in files:
            self.file((folder / name).read_bytes())
        else:
            self.answer(404, X_Error_Code='EntryNotFound')

    def tree(self, base, files, recursive):
        start = f'{base}/' if base else ''
        below = [name for name in files if name.startswith(start)]
        if recursive:
            return [self.entry(name) for name in below]
        folders = {start + name[len(start) :].split('/')[0] for name in below if '/' in name[len(start) :]}
        here = [self.entry(name) for name in below if '/' not in name[len(start) :]]
        return here + [
            {'type': 'directory', 'path': name, 'oid': '0' * 40, 'size': 0} for name in sorted(folders)
        ]

    def file(self, content):
        headers = {
            'ETag': f'"{hashlib.sha1(content).hexdigest()}"',
            'X_Repo_Commit': COMMIT,
            'Accept_Ranges': 'bytes',
        }
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if wanted and self.command == 'GET':
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            part = content[first : last + 1]
            place = f'bytes {first}-{first + len(part) - 1}/{len(content)}'
            self.answer(206, part, Content_Range=place, **headers)
        else:
            self.answer(200, content, length=len(content), **headers)


@contextmanager
def serving(folder, repo):
    """Serves `folder` as the dataset repository `repo` -> (address for HF_ENDPOINT, list of requests)."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.folder, server.repo, server.requests = folder, repo, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', server.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
