// An inbox in the browser, for those who write programs that send mail: one loop, two servers, no thread. Mail comes in
// by SMTP and is looked at by HTTP. The page asks for the list; the answer waits in the loop until there is new mail.
//
//     c++ -std=c++17 -I. tests/examples/inbox.cpp smtpd.cpp asyncore.cpp -o inbox
//     ./inbox                             # mail goes to 127.0.0.1:1025; look at http://127.0.0.1:8025/
//
// Usage: inbox [SMTP_PORT [HTTP_PORT [KEEP]]]. The last KEEP messages are kept (100), and 256 MiB of them at most.
// For tests: GET /messages, a list in JSON; /messages?not=VERSION, the same once it has another version, or after 25
// seconds; /messages/ID/text, /html, /source, /parts/N; DELETE /messages, /messages/ID.
#include <cstdlib>
#include <iostream>
#include <sstream>

#include "mime.hpp"
#include "smtpd.hpp"

extern const char *const page, *const style, *const script;
const std::string nothing = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; ";

std::string json(std::string_view text) {
    std::string to = "\"";
    for (const char c : mime::to_utf8(text)) {
        if (c == '"' || c == '\\') to += '\\';
        to += c < 0 || c >= ' ' ? std::string(1, c) : std::string("\\u00") + "01"[c >> 4] + "0123456789abcdef"[c & 15];
    }
    return to + '"';
}

std::string array(std::string items) {   // each has a comma behind it
    if (!items.empty()) items.pop_back();
    return "[" + items + "]";
}

struct Mail {
    const std::int64_t id;
    const std::string data;
    const std::vector<mime::part> parts;   // these look into `data`
    const mime::part* html = nullptr;      // one of them
    std::string text, summary;             // the summary is JSON

    Mail(std::int64_t number, const std::string& mailfrom, const std::vector<std::string>& rcpttos, std::string&& all)
        : id(number), data(std::move(all)), parts(mime::part(data).leaves()) {
        std::string to, files;
        for (const auto& it : rcpttos) to += json(it) + ",";
        for (const auto& it : parts) {
            if (it.type == "text/plain" && !it.attachment) text += it.text();
            if (it.type == "text/html" && !it.attachment && !html) html = &it;
            if (!it.attachment) continue;
            files += "{\"part\":" + std::to_string(&it - parts.data()) + ",\"type\":" + json(it.type);
            files += ",\"name\":" + json(it.filename) + ",\"size\":" + std::to_string(it.content().size()) + "},";
        }
        const auto now = std::chrono::system_clock::now().time_since_epoch() / std::chrono::milliseconds(1);
        summary = "{\"id\":" + std::to_string(id) + ",\"time\":" + std::to_string(now);
        for (const std::string name : {"subject", "from", "to"})
            summary += ",\"" + name + "\":" + json(mime::part(data).header(name));
        summary += ",\"mailfrom\":" + json(mailfrom) + ",\"rcpttos\":" + array(to) +
                   ",\"html\":" + (html ? "true" : "false") + ",\"size\":" + std::to_string(data.size()) +
                   ",\"preview\":" + json(text.substr(0, 300)) + ",\"parts\":" + array(files) + "},";
    }
    Mail(const Mail&) = delete;
};

// The mail, and the server that shows it.
struct Inbox : asyncore::dispatcher {
    std::size_t keep = 100, bytes = 0;
    std::list<Mail> mails;
    std::int64_t last_id = 0,
                 version = std::chrono::system_clock::now().time_since_epoch() / std::chrono::milliseconds(1);
    std::list<class HTTPChannel*> waiting;   // for another version

    explicit Inbox(const asyncore::address& where) {
        create_socket();
        set_reuse_addr();
        bind(where);
        listen(SOMAXCONN);
    }
    ~Inbox() override { asyncore::close_all(_map, true); }   // they all look at this
    void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) override;
    void add(const std::string& mailfrom, const std::vector<std::string>& rcpttos, std::string&& data) {
        mails.emplace_back(++last_id, mailfrom, rcpttos, std::move(data));
        bytes += mails.back().data.size() + mails.back().text.size();
        while (mails.size() > keep || (bytes > 256 << 20 && mails.size() > 1)) remove(mails.begin());
        changed();
    }
    void remove(std::list<Mail>::iterator it) { bytes -= it->data.size() + it->text.size(), mails.erase(it); }
    void remove_all() { bytes = 0, mails.clear(); }
    void changed();
};

// A browser's connection. A request is what stands before its empty line: none has a body.
class HTTPChannel : public asynchat::async_chat {
    Inbox& inbox_;
    std::string method_;
    bool last_ = false;   // no other request follows
    asyncore::clock::time_point due_;

  public:
    HTTPChannel(std::unique_ptr<asyncore::socket_type> sock, Inbox& of)
        : async_chat(std::move(sock), of._map), inbox_(of) {
        set_terminator("\r\n\r\n");
        ac_out_queue_limit = 1;   // the next request is read when this one's answer is sent
        wait(30);
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
        std::string line, target, protocol;
        std::map<std::string, std::string> fields;
        std::getline(lines, line);
        std::istringstream(line) >> method_ >> target >> protocol;
        while (std::getline(lines, line)) {
            const auto colon = std::min(line.find(':'), line.size());
            auto& field = fields[mime::lower(line.substr(0, colon))];
            (field += field.empty() ? "" : ", ") += mime::strip(line.substr(std::min(colon + 1, line.size())));
        }
        last_ = protocol != "HTTP/1.1" || mime::lower(fields["connection"]) == "close";
        // No page but ours may drive this. A name that another's DNS leads here stands in Host; a page of another site
        // is told by Origin or Sec-Fetch-Site. That one may lead to "/", and no further.
        const auto host = fields["host"], name = host.substr(0, host.rfind(':')), site = fields["sec-fetch-site"];
        const bool local = name == "localhost" || name == "127.0.0.1" || name == "[::1]";
        if (!local || host != name + ":" + std::to_string(inbox_.socket->getsockname().port))
            return fail("421 Misdirected Request");
        if (fields.count("origin") > 0 && fields["origin"] != "http://" + host) return fail("403 Forbidden");
        if (site != "" && site != "same-origin" && site != "none" && target != "/") return fail("403 Forbidden");
        if (fields.count("transfer-encoding") > 0 || fields["content-length"].find_first_not_of('0') != line.npos)
            return fail("413 Content Too Large");
        if (method_ != "GET" && method_ != "HEAD" && method_ != "DELETE")
            return fail("405 Method Not Allowed", "Allow: GET, HEAD, DELETE\r\n");
        std::vector<std::string> path;   // messages, ID, parts, N
        lines = std::istringstream(target.substr(0, target.find('?')));
        while (std::getline(lines, line, '/')) path.push_back(line);
        path.resize(5);
        answer_request(target, path[1], path[2], path[3], path[4]);
    }
    void answer_request(const std::string& target, const std::string& top, const std::string& id,
                        const std::string& what, const std::string& number) {
        const auto mail = std::find_if(inbox_.mails.begin(), inbox_.mails.end(),
                                       [&](auto& it) { return std::to_string(it.id) == id; });
        if (target == "/")
            return answer("text/html", page, "",
                          nothing +
                              "script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
                              "frame-src 'self'; require-trusted-types-for 'script'");
        if (target == "/inbox.css") return answer("text/css", style);
        if (target == "/inbox.js") return answer("text/javascript", script);
        if (top != "messages" || (id != "" && mail == inbox_.mails.end())) return fail("404 Not Found");
        if (method_ == "DELETE") {
            if (what != "") return fail("404 Not Found");
            id != "" ? inbox_.remove(mail) : inbox_.remove_all();
            inbox_.changed();
        }
        if (id == "" && target.find("?not=" + std::to_string(inbox_.version)) != target.npos) {
            inbox_.waiting.push_back(this);
            wait(25);
            return pause();
        }
        if (id == "" || method_ == "DELETE") return answer_list();
        if (what == "source") return answer("text/plain", mail->data);
        if (what == "text") return answer("text/plain", mail->text);
        // A stranger's page runs nothing and loads nothing, and its links open elsewhere.
        if (what == "html" && mail->html)
            return answer(
                "text/html", "<!doctype html><base target=_blank>" + with_pictures(*mail), "",
                nothing +
                    "img-src data:; style-src 'unsafe-inline'; sandbox allow-popups allow-popups-to-escape-sandbox");
        const auto n = static_cast<std::size_t>(std::atoi(number.c_str()));
        if (what != "parts" || n >= mail->parts.size()) return fail("404 Not Found");
        std::string name;   // any byte may stand in it
        for (const char c : mail->parts[n].filename)
            ((name += '%') += "0123456789ABCDEF"[c >> 4 & 15]) += "0123456789ABCDEF"[c & 15];
        answer("application/octet-stream", mail->parts[n].content(),
               "Content-Disposition: attachment; filename*=UTF-8''" + name + "\r\n");
    }
    // src="cid:NAME" is a picture that came with the message: it is put in as it came, in base64.
    static std::string with_pictures(const Mail& mail) {
        const std::string html = mail.html->text();
        std::string to;
        std::size_t at = 0;
        for (std::size_t cid; (cid = html.find("cid:", at)) != html.npos && to.size() < 32 << 20;) {
            to += html.substr(at, cid - at);
            at = std::min(html.find_first_of("\"')> \n", cid), html.size());
            const auto id = html.substr(cid + 4, at - cid - 4);
            const auto it = std::find_if(mail.parts.begin(), mail.parts.end(),
                                         [&](auto& part) { return part.id == id && part.encoding == "base64"; });
            if (it == mail.parts.end()) continue;
            to += "data:image/png;base64,";   // it is looked at which kind it is
            for (const char c : it->body)
                if (std::isalnum(static_cast<unsigned char>(c)) || c == '+' || c == '/' || c == '=') to += c;
        }
        return to + html.substr(at);
    }
    void answer_list() {
        std::string list;
        for (const auto& mail : inbox_.mails) list += mail.summary;
        inbox_.waiting.remove(this);
        resume();
        answer("application/json",
               "{\"version\":" + std::to_string(inbox_.version) + ",\"messages\":" + array(list) + "}");
    }
    void fail(const std::string& status, const std::string& more = "") {
        last_ = true;
        answer("text/plain", status + "\n", more, nothing, status);
    }
    void answer(const std::string& type, const std::string& body, const std::string& more = "",
                const std::string& policy = nothing + "sandbox", const std::string& status = "200 OK") {
        wait(30);
        push("HTTP/1.1 " + status + "\r\nContent-Type: " + type +
             "; charset=utf-8\r\nContent-Length: " + std::to_string(body.size()) +
             "\r\nConnection: " + (last_ ? "close" : "keep-alive") + "\r\nContent-Security-Policy: " + policy +
             "\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
             "Cross-Origin-Resource-Policy: same-origin\r\nX-DNS-Prefetch-Control: off\r\n" +
             more + "\r\n" + (method_ == "HEAD" ? "" : body));
        if (last_) end_input(), close_when_done();
    }
};

void Inbox::handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) {
    if (_map->size() < 200) _map->own(std::make_unique<HTTPChannel>(std::move(sock), *this));
}

void Inbox::changed() {
    ++version;
    while (!waiting.empty()) waiting.front()->answer_list();
}

struct MailServer : smtpd::SMTPServer {
    Inbox& inbox;
    MailServer(const asyncore::address& where, Inbox& to) : SMTPServer(where, {}), inbox(to) {}
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options&) override {
        inbox.add(mailfrom, rcpttos, std::move(data));
        return std::nullopt;
    }
};

int main(int argc, char** argv) {
    Inbox inbox({"127.0.0.1", argc > 2 ? std::atoi(argv[2]) : 8025});
    if (argc > 3) inbox.keep = std::max<std::size_t>(1, std::strtoul(argv[3], nullptr, 10));
    MailServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, inbox);
    std::cout << "mail to " << server.socket->getsockname().str() << ", look at http://"
              << inbox.socket->getsockname().str() << '/' << std::endl;
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
:root { color-scheme: light dark; --paper: #f7f5f1; --sheet: #fffefc; --ink: #24211d; --soft: #6f695f; --line: #e4dfd5;
  --accent: #b3472b; --pick: #f1e6dc; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --sheet: #1e2023; --ink: #dedad2; --soft: #98938a;
  --line: #303337; --accent: #e88a6a; --pick: #33291f; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
body { margin: 0; height: 100vh; display: grid; grid-template-columns: minmax(290px, 370px) minmax(0, 1fr);
  background: var(--paper); color: var(--ink); }
aside, main { display: flex; flex-direction: column; min-height: 0; }
header, .row { display: flex; flex-wrap: wrap; gap: 8px; align-items: baseline; padding: 0 0 12px; }
header, section { padding: 18px 20px 12px; }
h1, h2, dl, dd { margin: 0; overflow-wrap: anywhere; overflow: auto; }
h1 { font-size: 21px; }
h2 { font-size: 23px; line-height: 1.25; padding-bottom: 10px; max-height: 5em; flex-shrink: 0; }
button, .button { font: inherit; font-size: 13px; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: 7px; padding: 4px 11px; cursor: pointer; text-decoration: none; }
button:hover, .button:hover { border-color: var(--soft); }
[aria-pressed=true], nav a.open { background: var(--pick); border-color: var(--accent) !important; }
#state, #gap { flex: 1; }
#state, small, time, p, dt { color: var(--soft); font-size: 13px; }
nav { overflow: auto; }
nav a { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 10px; padding: 11px 20px 11px 17px; color: inherit;
  border-left: 3px solid transparent; box-shadow: 0 -1px var(--line); text-decoration: none; animation: came 1.5s; }
nav a > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 400; font-style: normal; }
nav .new b, nav .new i { font-weight: 650; }
nav a:not(.open):hover { background: var(--sheet); }
@keyframes came { from { background: var(--pick); } }
main { background: var(--sheet); border-left: 1px solid var(--line); padding: 22px 32px 24px; }
main > p { margin: auto; font-size: 15px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 14px; padding-bottom: 14px; font-size: 14px; max-height: 9em; }
#body { flex: 1; min-height: 0; overflow: auto; margin: 0; padding-top: 14px; border-top: 1px solid var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, "Liberation Mono", monospace; }
iframe#body { padding: 0; border: 1px solid var(--line); border-radius: 8px; background: #fff; color-scheme: light; }
@media (min-width: 761px) { #back { display: none; } }
@media (max-width: 760px) { body { display: block; } aside, main { height: 100vh; } main { padding: 16px; border: 0; }
  body:not(.reading) main, .reading aside { display: none; } h2 { font-size: 19px; } }
@media (prefers-reduced-motion) { nav a { animation: none; } })~",
                  *const script = R"~(
const $ = id => document.getElementById(id), read = new Set(), rows = new Map();
const make = (tag, props, ...inside) => {
  const it = Object.assign(document.createElement(tag), props);
  it.append(...inside);
  return it;
};
const size = n => n < 1000 ? n + ' bytes' : n < 1e6 ? (n / 1e3).toFixed(1) + ' kB' : (n / 1e6).toFixed(1) + ' MB';
let version = 0, mails = [], open = 0;

function row(mail) {
  const time = new Date(mail.time), today = time.toDateString() === new Date().toDateString();
  return make('a', { href: '#' + mail.id }, make('b', {}, mail.from.replace(/"|\s*<[^<>]*>$/g, '') || mail.mailfrom),
    make('time', {}, today ? time.toTimeString().slice(0, 5) : time.toLocaleDateString()),
    make('i', {}, mail.subject || '(no subject)'), make('small', {}, mail.parts.length ? '+ ' + mail.parts.length : ''),
    make('small', {}, mail.preview || '\u00a0'));
}

function draw() {
  for (const id of [...rows.keys()].filter(id => !mails.some(mail => mail.id === id))) rows.delete(id);
  for (const mail of mails) {
    if (!rows.has(mail.id)) rows.set(mail.id, row(mail));
    rows.get(mail.id).className = (mail.id === open ? 'open ' : '') + (read.has(mail.id) ? '' : 'new');
  }
  $('list').replaceChildren(...mails.map(mail => rows.get(mail.id)));
  const unread = mails.filter(mail => !read.has(mail.id)).length;
  document.title = (unread ? '(' + unread + ') ' : '') + 'Inbox';
  $('state').textContent = ['', '1 message'][mails.length] ?? mails.length + ' messages';
  $('clear').hidden = !mails.length;
  $('empty').hidden = mails.length > 0;
}

function show() {
  open = Number(location.hash.slice(1));
  const mail = mails.find(it => it.id === open), url = '/messages/' + open + '/';
  if (mail) read.add(open);
  document.body.className = mail ? 'reading' : '';
  draw();
  if (!mail) return $('pane').replaceChildren(make('p', {}, mails.length ? 'Choose a message.' : ''));
  const tabs = (mail.html ? mail.preview ? ['HTML', 'Text', 'Source'] : ['HTML', 'Source'] : ['Text', 'Source'])
    .map(name => make('button', { onclick: () => view(name) }, name));
  async function view(name) {
    tabs.forEach(tab => tab.setAttribute('aria-pressed', tab.textContent === name));
    if (name === 'HTML') return $('body').replaceWith(make('iframe', { id: 'body', title: 'The message', src: url + 'html',
      sandbox: 'allow-popups allow-popups-to-escape-sandbox' }));
    const text = await (await fetch(url + name.toLowerCase())).text();
    $('body').replaceWith(make('pre', { id: 'body', tabIndex: 0 }, text.slice(0, 1e6)));
  }
  const facts = { From: mail.from, To: mail.to, Envelope: mail.mailfrom + ' \u2192 ' + mail.rcpttos.join(', '),
    Received: new Date(mail.time).toLocaleString() + ', ' + size(mail.size) };
  $('pane').replaceChildren(make('h2', {}, mail.subject || '(no subject)'),
    make('dl', {}, ...Object.entries(facts).flatMap(fact => fact[1] ? [make('dt', {}, fact[0]), make('dd', {}, fact[1])] : [])),
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
  const answer = await (await fetch('/messages?not=' + version)).json(), before = version;
  version = answer.version;
  mails = answer.messages.reverse();
  if (version !== before) mails.some(mail => mail.id === open) && before ? draw() : show();
  // A browser has six connections for all its pages: those that are out of sight need none.
  if (document.hidden) await new Promise(then => document.addEventListener('visibilitychange', then, { once: true }));
}
async function lost() {
  $('state').textContent = 'The server is gone.';
  version = 0;
  await new Promise(then => setTimeout(then, 1000));
}
onhashchange = show;
$('clear').onclick = () => confirm('Delete all messages?') && fetch('/messages', { method: 'DELETE' });
(async () => { for (;;) await watch().catch(lost); })();
)~";
