// The command line of smtpd.py: `smtpd [options] [localhost:localport [remotehost:remoteport]]`.
//
// A program with a server class of its own gets the same command line by linking this file and registering the
// class (smtpd.hpp: server_class).

#include <fcntl.h>
#include <grp.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <iostream>

#include "smtpd.hpp"

namespace {

// smtpd.py: program
std::string program;

constexpr char doc[] = R"(An SMTP server (RFC 5321), with SIZE, 8BITMIME and SMTPUTF8.

Usage: %program% [options] [localhost:localport [remotehost:remoteport]]

Options:

    -n, --nosetuid
        Don't become `nobody' once it listens, which takes root to do.

    -V, --version
        Print the version and exit.

    -c, --class NAME
        What to do with the messages: %classes%.
        PureProxy by default.

    -s, --size BYTES
        The largest message: 33554432 by default, 0 for no limit (RFC 1870).

    -u, --smtputf8
        Offer SMTPUTF8 (RFC 6531).

    --mailman-lists FOLDER
    --mailman-lmtp HOST:PORT
        For MailmanProxy: the folder `lists' of Mailman 3, and its LMTP server;
        /var/lib/mailman3/lists and 127.0.0.1:8024 by default.

    -d, --debug
        Print the conversation on stderr.

    -h, --help
        Print this and exit.

It listens on localhost:8025 by default; the proxies send to the remote host,
localhost:25 by default. An IPv6 address stands in brackets: [::1]:8025.

The proxies send mail anywhere for every client: an open relay, if strangers
can reach it.

Version: %version%
)";

// smtpd.py: usage
[[noreturn]] void usage() {
    std::string classes;
    for (const auto& [name, make] : smtpd::server_class::all()) classes += (classes.empty() ? "" : ", ") + name;
    std::string text = doc;
    const std::pair<std::string, std::string> values[] = {
        {"%program%", program}, {"%classes%", classes}, {"%version%", std::string(smtpd::version)}};
    for (const auto& [mark, value] : values) text.replace(text.find(mark), mark.size(), value);
    std::cerr << text;
    std::exit(0);
}

// Python: the whole usage, with the mistake as its last line.
[[noreturn]] void mistake(const std::string& what) {
    std::cerr << program << ": " << what << "; -h tells the options\n";
    std::exit(1);
}

// smtpd.py: Options
struct Options {
    bool setuid = true;
    std::string classname = "PureProxy";
    smtpd::options with;   // size_limit and enable_SMTPUTF8 among them
    asyncore::address local{"localhost", 8025}, remote{"localhost", 25};
};

// A decimal number, no larger than `largest`.
std::size_t number(const std::string& text, std::size_t largest, const std::string& complaint) {
    const bool digits = !text.empty() && text.size() <= 18 && text.find_first_not_of("0123456789") == text.npos;
    if (!digits || std::stoull(text) > largest) mistake(complaint);
    return static_cast<std::size_t>(std::stoull(text));
}

// host:port, or [host]:port; `kind` is for the complaint.
asyncore::address parse_spec(const std::string& spec, const std::string& kind) {
    const std::size_t bracket = spec.empty() || spec[0] != '[' ? spec.npos : spec.find("]:");
    const std::size_t colon = bracket == spec.npos ? spec.find(':') : bracket + 1;
    if (colon == spec.npos) mistake("Bad " + kind + " spec: " + spec);
    const std::size_t port = number(spec.substr(colon + 1), 65535, "Bad " + kind + " port: " + spec);
    const std::string host = bracket == spec.npos ? spec.substr(0, colon) : spec.substr(1, bracket - 1);
    return {host, static_cast<int>(port)};
}

[[noreturn]] void print_version() {
    std::cout << smtpd::version << std::endl;
    std::exit(0);
}

struct option {
    char letter;   // 0: there is no short form
    std::string name;
    bool takes_value;
    void (*set)(Options& options, const std::string& value);

    std::string shown(bool is_long) const { return is_long ? "--" + name : std::string("-") + letter; }
};

const option known_options[] = {
    {'n', "nosetuid", false, [](auto& options, auto&) { options.setuid = false; }},
    {'V', "version", false, [](auto&, auto&) { print_version(); }},
    {'h', "help", false, [](auto&, auto&) { usage(); }},
    {'c', "class", true, [](auto& options, auto& value) { options.classname = value; }},
    {'s', "size", true,
     [](auto& options, auto& value) {
         options.with.data_size_limit = number(value, SIZE_MAX, "Invalid size: " + value);
     }},
    {'u', "smtputf8", false, [](auto& options, auto&) { options.with.enable_SMTPUTF8 = true; }},
    {'d', "debug", false, [](auto&, auto&) { smtpd::DEBUGSTREAM.rdbuf(std::cerr.rdbuf()); }},
    {0, "mailman-lists", true, [](auto& options, auto& value) { options.with.mailman_lists = value; }},
    {0, "mailman-lmtp", true,
     [](auto& options, auto& value) { options.with.mailman_lmtp = parse_spec(value, "LMTP"); }},
};

// The option that -n or --name means; a unique beginning of a long name will do.
const option& find_option(const std::string& shown) {
    const bool is_long = shown[1] == '-';
    const option* found = nullptr;
    for (const auto& candidate : known_options) {
        const std::string name = candidate.shown(is_long);
        if (name == shown) return candidate;
        if (!is_long || name.compare(0, shown.size(), shown) != 0) continue;
        if (found) mistake("option " + shown + " not a unique prefix");
        found = &candidate;
    }
    if (!found) mistake("option " + shown + " not recognized");
    return *found;
}

// Python's getopt: takes the options off the front of `args`.
std::vector<std::pair<const option*, std::string>> getopt(std::vector<std::string>& args) {
    std::vector<std::pair<const option*, std::string>> given;
    auto next = args.begin();
    while (next != args.end() && next->size() > 1 && (*next)[0] == '-') {
        std::string arg = *next++;
        if (arg == "--") break;
        const bool is_long = arg[1] == '-';
        while (arg.size() > 1) {
            const std::size_t end = is_long ? std::min(arg.find('='), arg.size()) : 2;
            const option& it = find_option(arg.substr(0, end));
            const std::string rest = arg.substr(end);   // "=VALUE"; VALUE, or more letters
            const std::string name = "option " + it.shown(is_long);
            std::string value = rest.substr(is_long && !rest.empty() ? 1 : 0);
            if (!it.takes_value && is_long && !rest.empty()) mistake(name + " must not have an argument");
            if (it.takes_value && rest.empty()) {
                if (next == args.end()) mistake(name + " requires argument");
                value = *next++;
            }
            given.emplace_back(&it, value);
            arg = is_long || it.takes_value ? "" : "-" + rest;
        }
    }
    args.erase(args.begin(), next);
    return given;
}

// smtpd.py: parseargs
Options parseargs(std::vector<std::string> args) {
    Options options;
    for (const auto& [option, value] : getopt(args)) option->set(options, value);
    if (args.size() > 2) {
        std::string all;
        for (const auto& arg : args) all += (all.empty() ? "" : ", ") + arg;
        mistake("Invalid arguments: " + all);
    }
    if (!args.empty()) options.local = parse_spec(args[0], "local");
    if (args.size() > 1) options.remote = parse_spec(args[1], "remote");
    return options;
}

// Becomes nobody, without a way back: the groups go first, they need root.
void become_nobody() {
    const passwd* nobody = ::getpwnam("nobody");
    if (nobody && ::getuid() == nobody->pw_uid && ::geteuid() == nobody->pw_uid) return;
    if (nobody && !::setgroups(0, nullptr) && !::setgid(nobody->pw_gid) && !::setuid(nobody->pw_uid)) return;
    std::cerr << "Cannot setuid \"nobody\"; try running with -n option.\n";
    std::exit(1);
}

bool is_loopback(const asyncore::address& addr) {
    return addr.family == AF_UNIX || addr.host == "::1" || addr.host.compare(0, 4, "127.") == 0;
}

int signal_pipe[2];

extern "C" void on_signal(int) {
    const int saved = errno;
    for (const int number : {SIGINT, SIGTERM}) std::signal(number, SIG_DFL);   // the second one ends it
    // When the pipe is full, the loop has enough to read.
    if (::write(signal_pipe[1], "", 1) < 0) errno = saved;
}

// SIGINT and SIGTERM end the program when the messages in hand are done, or after a while; the second one at
// once, by the signal's own default. So does the loss of the listener, which asyncore closes when it fails: nothing
// would come any more.
class signal_watch : public asyncore::file_dispatcher {
  public:
    explicit signal_watch(smtpd::SMTPServer& server) : file_dispatcher(signal_pipe[0]), server_(server) {
        struct sigaction action {};
        action.sa_handler = on_signal;
        action.sa_flags = SA_RESTART;   // a write to stdout goes on
        for (const int number : {SIGINT, SIGTERM}) ::sigaction(number, &action, nullptr);
    }
    bool writable() override { return false; }
    asyncore::clock::time_point deadline() override {
        return server_.accepting ? asyncore::clock::time_point::max() : asyncore::clock::time_point::min();
    }
    void handle_timeout() override {
        lost = true;
        handle_read();
    }
    void handle_read() override {
        server_.stop(std::chrono::seconds(10));
        close();
    }

    bool lost = false;

  private:
    smtpd::SMTPServer& server_;
};

}   // namespace

// What smtpd.py does below its classes.
static int run(const std::vector<std::string>& args) {
    const Options options = parseargs(args);
    const auto& classes = smtpd::server_class::all();
    const auto make = classes.find(options.classname);
    if (make == classes.end()) mistake("there is no class " + options.classname);
#ifdef M_MMAP_THRESHOLD
    // Lest glibc keep the memory of large messages: after the first one it takes less and less of it from the system
    // directly, and gives less and less back.
    ::mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
    std::signal(SIGPIPE, SIG_IGN);
    std::unique_ptr<smtpd::SMTPServer> server;
    try {
        server = make->second(options.local, options.remote, options.with);
    } catch (const std::exception& error) {
        std::cerr << program << ": cannot listen on " << options.local.str() << ": " << error.what() << '\n';
        return 1;
    }
    if (options.setuid) become_nobody();
    server->check_settings();
    if (server->relays() && !is_loopback(server->socket->getsockname()))
        std::cerr << program << ": warning: whoever can reach " << options.local.str()
                  << " can send mail anywhere through it\n";
    if (::pipe(signal_pipe) < 0) throw std::system_error(errno, std::generic_category(), "pipe");
    ::fcntl(signal_pipe[1], F_SETFL, O_NONBLOCK);
    signal_watch watch(*server);
    asyncore::loop();
    if (watch.lost) std::cerr << program << ": the listener on " << options.local.str() << " was closed by an error\n";
    return watch.lost;
}

int main(int argc, char** argv) {
    try {
        program = argc > 0 ? argv[0] : "smtpd";
        return run(std::vector<std::string>(argv + (argc > 0), argv + argc));
    } catch (const std::exception& error) {
        std::cerr << program << ": " << error.what() << '\n';
        return 1;
    }
}
