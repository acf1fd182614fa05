"""A headless Chromium, by WebDriver: chromedriver and the standard library are all that it takes."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request

ELEMENT = 'element-6066-11e4-a52e-4f735466cecf'
KEYS = {'Enter': '\ue007', 'Escape': '\ue00c', 'Left': '\ue012', 'Right': '\ue014'}


def available():
    return bool(shutil.which('chromedriver') and (shutil.which('chromium') or shutil.which('chromium-browser')))


class Browser:
    def __init__(self, width=1600, height=1000, dark=False, hosts=None):
        """Nothing is fetched; or, with `hosts`, from where these rules lead: `MAP name 127.0.0.1:port`."""
        self.profile = tempfile.mkdtemp(prefix='study-browser-')
        self.driver = subprocess.Popen([shutil.which('chromedriver'), '--port=0'], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)
        self.session = None
        for line in self.driver.stdout:
            started = re.search(r'success.* on port (\d+)', line)
            if started:
                break
        else:
            raise OSError('chromedriver does not start')
        self.base = 'http://127.0.0.1:%s' % started[1]
        args = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage', '--hide-scrollbars',
                '--user-data-dir=' + self.profile, '--window-size=%d,%d' % (width, height)]
        # Whatever is not a file leads to a port where nobody listens.
        rules = (hosts + ', MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost') if hosts else 'MAP * ~NOTFOUND'
        args += ['--proxy-server=' + ('direct://' if hosts else 'http://127.0.0.1:9'), '--host-resolver-rules=' + rules]
        if dark:
            args.append('--force-dark-mode')
        chromium = shutil.which('chromium') or shutil.which('chromium-browser')
        made = self.call('POST', '/session', {'capabilities': {'alwaysMatch': {
            'browserName': 'chrome', 'goog:loggingPrefs': {'browser': 'ALL'},
            'goog:chromeOptions': {'binary': chromium, 'args': args}}}})
        self.session = made['sessionId']
        self.size(width, height)
        if dark:
            self.cdp('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': 'dark'}]})

    def call(self, method, path, body=None):
        url = self.base + ('/session/' + self.session if self.session else '') + path
        data = json.dumps(body or {}).encode() if method == 'POST' else None
        request = urllib.request.Request(url, data, {'Content-Type': 'application/json'}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.loads(answer.read())['value']
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:500]) from None

    def cdp(self, command, params=None):
        return self.call('POST', '/goog/cdp/execute', {'cmd': command, 'params': params or {}})

    def size(self, width, height):
        """The size of what is shown; a window could not be as narrow as a telephone."""
        self.cdp('Emulation.setDeviceMetricsOverride', {'width': width, 'height': height, 'deviceScaleFactor': 1,
                                                       'mobile': False})

    def open(self, url):
        self.call('POST', '/url', {'url': url})

    def run(self, script, *args):
        return self.call('POST', '/execute/sync', {'script': script, 'args': list(args)})

    def keys(self, text):
        """Types into whatever has the focus."""
        steps = []
        for key in [KEYS[text]] if text in KEYS else text:
            steps += [{'type': 'keyDown', 'value': key}, {'type': 'keyUp', 'value': key}]
        self.call('POST', '/actions', {'actions': [{'type': 'key', 'id': 'keyboard', 'actions': steps}]})

    def click(self, selector):
        found = self.call('POST', '/element', {'using': 'css selector', 'value': selector})
        self.call('POST', '/element/%s/click' % found[ELEMENT])

    def hover(self, selector):
        found = self.call('POST', '/element', {'using': 'css selector', 'value': selector})
        self.call('POST', '/actions', {'actions': [{'type': 'pointer', 'id': 'mouse', 'actions': [
            {'type': 'pointerMove', 'duration': 0, 'origin': found, 'x': 0, 'y': 0}]}]})

    def console(self):
        return [e for e in self.call('POST', '/se/log', {'type': 'browser'}) if e['level'] != 'DEBUG']

    def picture(self, path):
        with open(path, 'wb') as file:
            file.write(base64.b64decode(self.call('GET', '/screenshot')))

    def close(self):
        try:
            if self.session:
                self.call('DELETE', '')
        except (OSError, RuntimeError):
            pass
        self.driver.terminate()
        self.driver.wait()
        self.driver.stdout.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
