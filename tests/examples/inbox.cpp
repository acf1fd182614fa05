// An inbox in the browser, for those who write programs that send mail: one loop, two servers, no thread. Mail comes in
// by SMTP and is looked at by HTTP. The page asks for the list; the answer waits in the loop until there is new mail.
//
//     c++ -std=c++17 -I. tests/examples/inbox.cpp smtpd.cpp asyncore.cpp -o inbox
//     ./inbox                             # mail goes to 127.0.0.1:1025; look at http://127.0.0.1:8025/
//
// Usage: inbox [SMTP_PORT [HTTP_PORT [KEEP]]]. The last KEEP messages are kept (100), and 256 MiB of them at most.
// For tests: GET /messages, a list in JSON; /messages?not=VERSION, the same once it has another version, or after 25
// seconds; /messages/ID/text, /html, /source, /parts/N; DELETE /messages, /messages/ID.
#include <ctime>
#include <iostream>
#include <sstream>

#include "mime.hpp"
#include "smtpd.hpp"

extern const char *const page, *const style, *const script;
const std::string nothing = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; ";
const std::string ours = nothing + "script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; " +
                         "frame-src 'self'; require-trusted-types-for 'script'";
const std::string theirs =
    nothing + "img-src data:; style-src 'unsafe-inline'; sandbox allow-popups " + "allow-popups-to-escape-sandbox";

std::string json(std::string_view text) {
    std::string to = "\"";
    for (const char c : mime::to_utf8(text)) {
        if (c == '"' || c == '\\') to += '\\';
        to += c < 0 || c >= ' ' ? std::string(1, c) : std::string("\\u00") + "01"[c >> 4] + "0123456789abcdef"[c & 15];
    }
    return to + '"';
}

struct Mail {
    const std::int64_t id;
    const std::string data;
    const std::vector<mime::part> parts;   // these look into `data`
    std::string html, text, summary;       // the summary is JSON

    Mail(std::int64_t number, const std::string& mailfrom, const std::vector<std::string>& rcpttos, std::string&& all)
        : id(number), data(std::move(all)), parts(mime::part(data).leaves()) {
        std::string to, files;
        for (const auto& it : rcpttos) to += (to.empty() ? "" : ",") + json(it);
        for (const auto& it : parts) {
            if (!it.attachment) (it.type == "text/html" ? html : text) += it.text();
            if (it.attachment)
                files += (files.empty() ? "{\"part\":" : ",{\"part\":") + std::to_string(&it - parts.data()) +
                         ",\"type\":" + json(it.type) + ",\"name\":" + json(it.filename) +
                         ",\"size\":" + std::to_string(it.content().size()) + "}";
        }
        // A picture that came with the message is put in where it says "cid:NAME".
        for (const auto& it : parts) {
            const auto at = it.id.empty() || it.encoding != "base64" ? html.npos : html.find("cid:" + it.id);
            if (at != html.npos) html.replace(at, it.id.size() + 4, "data:image/png;base64," + mime::to_utf8(it.body));
        }
        // A link element connects, whatever the policy says, even from a frame within the page: it is renamed.
        for (std::size_t at = 0; (at = html.find('<', at)) != html.npos; ++at)
            if (const auto tag = mime::lower(html.substr(at + 1, 6)); tag == "iframe" || tag.substr(0, 4) == "link")
                html[at + 1] = 'x';
        summary = "{\"id\":" + std::to_string(id) + ",\"time\":" + std::to_string(std::time(nullptr));
        for (const std::string name : {"subject", "from", "to"})
            summary += ",\"" + name + "\":" + json(mime::part(data).header(name).substr(0, 1000));
        summary += ",\"mailfrom\":" + json(mailfrom) + ",\"rcpttos\":[" + to +
                   "],\"html\":" + (html.empty() ? "false" : "true") + ",\"size\":" + std::to_string(data.size()) +
                   ",\"preview\":" + json(text.substr(0, 300)) + ",\"parts\":[" + files + "]}";
    }
    Mail(const Mail&) = delete;
    std::size_t size() const { return data.size() + html.size() + text.size(); }
};

// The mail, and the server that takes it.
struct Inbox : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::size_t keep = 100, bytes = 0;
    std::list<Mail> mails;
    std::int64_t last_id = 0, version = std::time(nullptr) * 1000;   // another start has others
    std::list<class HTTPChannel*> waiting;                           // for another version

    ~Inbox() override { asyncore::close_all(_map, true); }   // while that is there which the others look at
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options&) override {
        mails.emplace_back(++last_id, mailfrom, rcpttos, std::move(data));
        bytes += mails.back().size();
        while (mails.size() > keep || (bytes > 256 << 20 && mails.size() > 1)) remove(mails.begin());
        return changed(), std::nullopt;
    }
    void remove(std::list<Mail>::iterator it) { bytes -= it->size(), mails.erase(it); }
    void changed();
};

// A browser's connection. A request is what stands before its empty line: none has a body.
class HTTPChannel : public asynchat::async_chat {
    Inbox& inbox_;
    bool last_ = false;   // no other request follows
    asyncore::clock::time_point due_ = asyncore::clock::now() + std::chrono::seconds(30);

  public:
    HTTPChannel(std::unique_ptr<asyncore::socket_type> sock, Inbox& of)
        : async_chat(std::move(sock), of._map), inbox_(of) {
        set_terminator("\r\n\r\n");
        ac_out_queue_limit = 1;   // the next request is read when this one's answer is sent
    }
    void wait(int seconds) { due_ = asyncore::clock::now() + std::chrono::seconds(seconds); }
    void close() override { inbox_.waiting.remove(this), async_chat::close(); }
    void handle_write() override { wait(30), async_chat::handle_write(); }
    asyncore::clock::time_point deadline() override { return std::min(async_chat::deadline(), due_); }
    void handle_timeout() override {
        if (async_chat::deadline() <= asyncore::clock::now()) async_chat::handle_timeout();
        if (connected && due_ <= asyncore::clock::now()) paused() ? answer_list() : close();
    }
    void collect_incoming_data(std::string_view data) override {
        incoming += data;
        if (incoming.size() > 16384) fail("431 Request Header Fields Too Large");
    }
    void found_terminator() override {
        if (input_over()) return;
        std::istringstream lines(_get_data());
        std::string line, method, target, protocol;
        std::map<std::string, std::string> fields;
        std::getline(lines, line);
        std::istringstream(line) >> method >> target >> protocol;
        while (std::getline(lines, line)) {
            auto& field = fields[mime::lower(line.substr(0, line.find(':')))];
            (field += field.empty() ? "" : ", ") +=
                mime::strip(line.substr(std::min(line.find(':'), line.size() - 1) + 1));
        }
        last_ = protocol != "HTTP/1.1" || mime::lower(fields["connection"]) == "close";
        // No page but ours may drive this. A name that another's DNS leads here stands in Host; a page of another site
        // is told by Origin or Sec-Fetch-Site. That one may lead to "/", and no further.
        const auto host = fields["host"], name = host.substr(0, host.rfind(':')), site = fields["sec-fetch-site"];
        const bool local = name == "localhost" || name == "127.0.0.1" || name == "[::1]";
        if (!local || host != name + ":" + std::to_string(socket->getsockname().port))
            return fail("421 Misdirected Request");
        if (fields.count("origin") > 0 && fields["origin"] != "http://" + host) return fail("403 Forbidden");
        if (site != "" && site != "same-origin" && site != "none" && target != "/") return fail("403 Forbidden");
        if (fields["transfer-encoding"] != "" || fields["content-length"].find_first_not_of('0') != line.npos)
            return fail("413 Content Too Large");
        if (method != "GET" && method != "DELETE") return fail("405 Method Not Allowed", "Allow: GET, DELETE\r\n");
        answer_request(target, method == "DELETE");
    }
    void answer_request(const std::string& target, bool remove) {
        std::istringstream path(target.substr(0, target.find('?')));
        std::string top, id, what, part;
        for (std::string* it : {&top, &top, &id, &what, &part}) std::getline(path, *it, '/');
        auto mail = inbox_.mails.begin();
        while (mail != inbox_.mails.end() && std::to_string(mail->id) != id) ++mail;
        const bool all = id == "", found = mail != inbox_.mails.end();
        const auto n = static_cast<std::size_t>(std::atoi(part.c_str()));
        if (target == "/") return answer("text/html", page, "", ours);
        if (target == "/inbox.css") return answer("text/css", style);
        if (target == "/inbox.js") return answer("text/javascript", script);
        if (top != "messages" || (!all && !found) || (remove && what != "")) return fail("404 Not Found");
        while (remove && all && !inbox_.mails.empty()) inbox_.remove(inbox_.mails.begin());
        if (remove && found) inbox_.remove(mail);
        if (remove) inbox_.changed();
        if (all && target.find("?not=" + std::to_string(inbox_.version)) != target.npos)
            return inbox_.waiting.push_back(this), wait(25), pause();
        if (all || remove) return answer_list();
        if (what == "source") return answer("text/plain", mail->data);
        if (what == "text") return answer("text/plain", mail->text);
        if (what == "html") return answer("text/html", "<!doctype html><base target=_blank>" + mail->html, "", theirs);
        if (what != "parts" || n >= mail->parts.size()) return fail("404 Not Found");
        std::string name;   // any byte may stand in it
        for (const char c : mail->parts[n].filename)
            ((name += '%') += "0123456789ABCDEF"[c >> 4 & 15]) += "0123456789ABCDEF"[c & 15];
        answer("application/octet-stream", mail->parts[n].content(),
               "Content-Disposition: attachment; filename*=UTF-8''" + name + "\r\n");
    }
    void answer_list() {
        std::string list;
        for (const auto& mail : inbox_.mails) (list += list.empty() ? "" : ",") += mail.summary;
        inbox_.waiting.remove(this), resume();
        answer("application/json", "{\"version\":" + std::to_string(inbox_.version) + ",\"messages\":[" + list + "]}");
    }
    void fail(const std::string& status, const std::string& more = "") {
        answer("text/plain", status, more, nothing, status);
    }
    void answer(const std::string& type, const std::string& body, const std::string& more = "",
                const std::string& policy = nothing + "sandbox", const std::string& status = "200 OK") {
        wait(30);
        last_ = last_ || status != "200 OK";
        push("HTTP/1.1 " + status + "\r\nContent-Type: " + type +
             "; charset=utf-8\r\nContent-Length: " + std::to_string(body.size()) +
             (last_ ? "\r\nConnection: close" : "") + "\r\nContent-Security-Policy: " + policy + "\r\n" + more +
             "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
             "Cross-Origin-Resource-Policy: same-origin\r\nX-DNS-Prefetch-Control: off\r\n\r\n" +
             body);
        if (last_) end_input(), close_when_done();
    }
};

void Inbox::changed() {
    ++version;
    while (!waiting.empty()) waiting.front()->answer_list();
}

struct HTTPServer : asyncore::dispatcher {
    Inbox& inbox;
    HTTPServer(const asyncore::address& where, Inbox& of) : inbox(of) {
        create_socket(), set_reuse_addr(), bind(where), listen(SOMAXCONN);
    }
    void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) override {
        if (_map->size() < 200) _map->own(std::make_unique<HTTPChannel>(std::move(sock), inbox));
    }
};

int main(int argc, char** argv) {
    Inbox inbox({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, {});
    if (argc > 3) inbox.keep = std::max<std::size_t>(1, std::strtoul(argv[3], nullptr, 10));
    HTTPServer server({"127.0.0.1", argc > 2 ? std::atoi(argv[2]) : 8025}, inbox);
    std::cout << "mail to " + inbox.socket->getsockname().str() << ", look at http://"
              << server.socket->getsockname().str() << '/' << std::endl;
    asyncore::loop();
}

const char *const page = R"~(<!doctype html><html lang="en"><meta charset="utf-8"><title>Inbox</title><link rel="icon"
href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><rect y='2' width='16' height='12'
rx='2' fill='%23b3472b'/><path d='m2 5 6 4 6-4' fill='none' stroke='white'/></svg>">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/inbox.css">
<script src="/inbox.js" defer></script>
<aside><header><h1>Inbox</h1><span id="state" role="status"></span><button id="clear" hidden>Delete all</button></header>
<nav id="list"></nav><section id="empty" hidden><h2>No mail yet</h2><p>What is sent here shows as soon as it comes.</p>
<pre>swaks --server 127.0.0.1:1025 \
      --to you@example.com</pre></section></aside><main id="pane"></main>)~",
                  *const style = R"~(
:root { color-scheme: light dark; --paper: light-dark(#f7f5f1, #17181a); --sheet: light-dark(#fffefc, #1e2023);
  --ink: light-dark(#24211d, #dedad2); --soft: light-dark(#6f695f, #98938a); --line: light-dark(#e4dfd5, #303337);
  --pick: light-dark(#f1e6dc, #33291f); --accent: light-dark(#b3472b, #e88a6a);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
* { box-sizing: border-box; margin: 0; overflow-wrap: anywhere; } [hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
body { height: 100vh; display: grid; grid-template-columns: minmax(290px, 370px) minmax(0, 1fr); background: var(--paper);
  color: var(--ink); }
aside, main { display: flex; flex-direction: column; min-height: 0; }
header, .row { display: flex; flex-wrap: wrap; gap: 8px; align-items: baseline; padding-bottom: 12px; }
header, section { padding: 18px 20px 12px; }
h1 { font-size: 21px; } main > p { margin: auto; } nav { overflow: auto; } #state, #gap { flex: 1; }
h2 { font-size: 23px; line-height: 1.25; padding-bottom: 10px; max-height: 5em; overflow: auto; flex-shrink: 0; }
button, .button { font: inherit; font-size: 13px; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: 7px; padding: 4px 11px; cursor: pointer; text-decoration: none; }
button:hover, .button:hover { border-color: var(--soft); }
[aria-pressed=true], nav a.open { background: var(--pick); border-color: var(--accent) !important; }
#state, small, time, p, dt { color: var(--soft); font-size: 13px; }
nav a { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 10px; padding: 11px 20px 11px 17px; color: inherit;
  border-left: 3px solid transparent; box-shadow: 0 -1px var(--line); text-decoration: none; animation: came 1.5s; }
nav a > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 400; font-style: normal; }
nav .new b, nav .new i { font-weight: 650; }
nav i + small { text-align: right; } nav small:last-child { grid-column: 1 / 3; }
nav a:not(.open):hover { background: var(--sheet); } @keyframes came { from { background: var(--pick); } }
main { background: var(--sheet); border-left: 1px solid var(--line); padding: 22px 32px 24px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 14px; padding-bottom: 14px; font-size: 14px; overflow: auto; }
pre { white-space: pre-wrap; font: 13px/1.5 ui-monospace, Menlo, "Liberation Mono", monospace; padding: 14px 0; }
#body { flex: 1 0 50%; overflow: auto; border: solid var(--line); border-width: 1px 0 0; }
iframe#body { border-width: 1px; border-radius: 8px; background: #fff; color-scheme: light; }
@media (min-width: 761px) { #back { display: none; } }
@media (max-width: 760px) { body { display: block; } aside, main { height: 100vh; } main { padding: 16px; border: 0; }
  body:not(.reading) main, .reading aside { display: none; } h2 { font-size: 19px; } })~",
                  *const script = R"~(
const $ = id => document.getElementById(id), read = new Set(), rows = new Map();
const make = (tag, props, ...inside) => (it => (it.append(...inside), Object.assign(it, props)))(document.createElement(tag));
const size = n => n < 1000 ? n + ' bytes' : n < 1e6 ? (n / 1e3).toFixed(1) + ' kB' : (n / 1e6).toFixed(1) + ' MB';
let version = 0, mails = [], open = 0;
function row(mail) {
  const time = new Date(mail.time * 1000), today = time.toDateString() === new Date().toDateString();
  const it = rows.get(mail.id) || make('a', { href: '#' + mail.id },
    make('b', {}, mail.from.replace(/"|\s*<[^<>]*>$/g, '') || mail.mailfrom),
    make('time', {}, today ? time.toTimeString().slice(0, 5) : time.toLocaleDateString()),
    make('i', {}, mail.subject || '(no subject)'), make('small', {}, mail.parts.length ? '+ ' + mail.parts.length : ''),
    make('small', {}, mail.preview || '\u00a0'));
  it.className = (mail.id === open ? 'open ' : '') + (read.has(mail.id) ? '' : 'new');
  return rows.set(mail.id, it), it;   // the same one the next time, so that only what comes is lit
}
function draw() {
  const unread = mails.filter(mail => !read.has(mail.id)).length;
  document.title = (unread ? '(' + unread + ') ' : '') + 'Inbox';
  $('list').replaceChildren(...mails.map(row));
  $('state').textContent = ['', '1 message'][mails.length] ?? mails.length + ' messages';
  $('empty').hidden = !($('clear').hidden = !mails.length);
}
function show() {
  open = Number(location.hash.slice(1));
  const mail = mails.find(it => it.id === open), url = '/messages/' + open + '/';
  if (mail) read.add(open);
  document.body.className = mail ? 'reading' : '';
  draw();
  if (!mail) return $('pane').replaceChildren(make('p', {}, mails.length ? 'Choose a message.' : ''));
  const tabs = [mail.html && 'HTML', (mail.preview || !mail.html) && 'Text', 'Source'].filter(name => name)
    .map(name => make('button', { onclick: () => view(name) }, name));
  async function view(name) {
    tabs.forEach(tab => tab.setAttribute('aria-pressed', tab.textContent === name));
    $('body').replaceWith(name === 'HTML' ?
      make('iframe', { id: 'body', src: url + 'html', sandbox: 'allow-popups allow-popups-to-escape-sandbox' }) :
      make('pre', { id: 'body', tabIndex: 0 }, (await (await fetch(url + name.toLowerCase())).text()).slice(0, 1e6)));
  }
  const facts = { From: mail.from, To: mail.to, Envelope: mail.mailfrom + ' \u2192 ' + mail.rcpttos.join(', '),
    Received: new Date(mail.time * 1000).toLocaleString() + ', ' + size(mail.size) };
  $('pane').replaceChildren(make('h2', {}, mail.subject || '(no subject)'),
    make('dl', {}, ...Object.entries(facts).flatMap(([name, text]) => [make('dt', {}, name), make('dd', {}, text)])),
    make('div', { className: 'row' }, make('a', { id: 'back', className: 'button', href: '#' }, '\u2190'), ...tabs,
      make('span', { id: 'gap' }), make('button', { id: 'delete', onclick: () => remove(mail.id) }, 'Delete')),
    make('div', { className: 'row', hidden: !mail.parts.length }, ...mail.parts.map(part => make('a', { className: 'button',
      href: url + 'parts/' + part.part, download: '' }, part.name || part.type, ' ', make('small', {}, size(part.size))))),
    make('pre', { id: 'body' }));
  view(tabs[0].textContent);
}
async function remove(id) {
  const at = mails.findIndex(it => it.id === id), next = mails[at + 1] || mails[at - 1];
  await fetch('/messages/' + id, { method: 'DELETE' });
  location.hash = next && innerWidth > 760 ? next.id : '';
}
async function watch() {
  try {
    const answer = await (await fetch('/messages?not=' + version)).json(), before = version;
    [mails, version] = [answer.messages.reverse(), answer.version];
    if (version !== before) before && mails.some(mail => mail.id === open) ? draw() : show();
    // A browser has six connections for all its pages: those that are out of sight need none.
    if (document.hidden) await new Promise(then => document.addEventListener('visibilitychange', then, { once: true }));
  } catch (error) {
    $('state').textContent = 'The server is gone.';
    await new Promise(then => setTimeout(then, 1000, version = 0));
  }
  watch();
}
onhashchange = show;
$('clear').onclick = () => confirm('Delete all messages?') && fetch('/messages', { method: 'DELETE' });
watch();
)~";
