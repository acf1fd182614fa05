// recorder: an SMTP server that writes down every message, for tests written in other languages.
//
//     recorder [options] FILE      serve on a port of its own and append each message to FILE
//     recorder --driver            replay sessions read from stdin (see "The driver" below)
//
// The server prints `port N` as its first line. Each message is one line of JSON, written and flushed before
// the client gets its answer:
//
//     {"peer": "127.0.0.1",
//      "mailfrom": "a@b", "mailfrom_hex": "614062",
//      "rcpttos": ["c@d"], "rcpttos_hex": ["634064"],
//      "mail_options": ["SIZE=10"], "mail_options_hex": ["53495a453d3130"],
//      "rcpt_options": [], "rcpt_options_hex": [],
//      "data_hex": "5375626a6563743a20780a"}
//
// NAME_hex are the bytes, two digits each, and always there. NAME is the same as text, for people; an item that
// is not UTF-8 is null there. The data has no text form.
//
//     --host H        127.0.0.1            --smtputf8      offer SMTPUTF8
//     --port N        0: any               --decode-data   messages must be UTF-8
//     --size N        the limit; 0: none   --poll          poll() instead of select()
//     --fqdn NAME     in the banner        --status TEXT   what process_message() returns
//     --stdin-eof     end when stdin ends  --throw         process_message() throws
//
// SIGTERM and SIGINT end it, with exit status 0.

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <fstream>
#include <functional>
#include <iostream>
#include <sstream>

#include "smtpd.hpp"

namespace {

// ---------------------------------------------------------------------------------------------------------
// JSON and hexadecimal
// ---------------------------------------------------------------------------------------------------------

constexpr char digits[] = "0123456789abcdef";

std::string hex(std::string_view bytes) {
    std::string text;
    text.reserve(bytes.size() * 2);
    for (const char c : bytes) {
        text += digits[static_cast<unsigned char>(c) >> 4];
        text += digits[static_cast<unsigned char>(c) & 15];
    }
    return text;
}

std::string unhex(std::string_view text) {
    const auto value = [&](std::size_t i) {
        const std::size_t found = i < text.size() ? std::string_view(digits).find(text[i]) : std::string_view::npos;
        if (found > 15) throw std::invalid_argument("not hexadecimal: " + std::string(text.substr(0, 40)));
        return static_cast<unsigned>(found);
    };
    std::string bytes;
    for (std::size_t i = 0; i < text.size(); i += 2) bytes += static_cast<char>(value(i) << 4 | value(i + 1));
    return bytes;
}

// A decoder of its own, so that the library is not asked about itself.
bool valid_utf8(std::string_view bytes) {
    std::size_t more = 0;
    unsigned long code = 0, least = 0;
    for (const char c : bytes) {
        const unsigned byte = static_cast<unsigned char>(c);
        if (more > 0) {
            if (byte >> 6 != 2) return false;
            code = code << 6 | (byte & 63);
            if (--more == 0 && (code < least || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff))) return false;
        } else if (byte >= 0xf8 || byte >> 6 == 2) {
            return false;
        } else if (byte >= 0x80) {
            more = byte >= 0xf0 ? 3 : byte >= 0xe0 ? 2 : 1;
            code = byte & (0x3fu >> more);
            least = more == 3 ? 0x10000 : more == 2 ? 0x800 : 0x80;
        }
    }
    return more == 0;
}

std::string json_text(const std::string& bytes) {
    if (!valid_utf8(bytes)) return "null";
    std::string text = "\"";
    for (const char c : bytes) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\')
            (text += '\\') += c;
        else if (byte < 0x20 || byte == 0x7f)
            ((text += "\\u00") += digits[byte >> 4]) += digits[byte & 15];
        else
            text += c;
    }
    return text += '"';
}

std::string json_hex(const std::string& bytes) { return '"' + hex(bytes) + '"'; }

std::string json_list(const std::vector<std::string>& items, std::string (*write)(const std::string&)) {
    std::string text;
    for (const auto& item : items) text += (text.empty() ? "" : ", ") + write(item);
    return "[" + text + "]";
}

std::string json_member(const std::string& name, const std::vector<std::string>& items) {
    return ", \"" + name + "\": " + json_list(items, json_text) + ", \"" + name +
           "_hex\": " + json_list(items, json_hex);
}

// ---------------------------------------------------------------------------------------------------------
// The server
// ---------------------------------------------------------------------------------------------------------

// What process_message() does after it has told of the message.
struct outcome {
    std::optional<std::string> status;
    bool throws = false;
};

class recording_channel : public smtpd::SMTPChannel {
  public:
    bool quiet = false;
    recording_channel** seat = nullptr;   // cleared when the channel goes

    using SMTPChannel::SMTPChannel;
    ~recording_channel() override {
        if (seat) *seat = nullptr;
    }
    void log_info(std::string_view message, std::string_view type) override {
        if (!quiet) SMTPChannel::log_info(message, type);
    }
};

class recording_server : public smtpd::SMTPServer {
  public:
    std::function<void(const std::string& json)> record;
    std::vector<outcome> outcomes;                // the one in turn depends on the number of recipients
    bool quiet = false;                           // nothing is logged
    recording_channel** next_channel = nullptr;   // where the next one made is wanted

    using SMTPServer::SMTPServer;

    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        auto made = std::make_unique<recording_channel>(*this, std::move(sock), from, settings);
        made->quiet = quiet;
        made->seat = std::exchange(next_channel, nullptr);
        if (made->seat) *made->seat = made.get();
        return made;
    }

    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        record("{\"peer\": " + json_text(peer.host) + ", \"mailfrom\": " + json_text(mailfrom) +
               ", \"mailfrom_hex\": " + json_hex(mailfrom) + json_member("rcpttos", rcpttos) +
               json_member("mail_options", kwargs.mail_options) + json_member("rcpt_options", kwargs.rcpt_options) +
               ", \"data_hex\": " + json_hex(data) + "}");
        if (outcomes.empty()) return std::nullopt;
        const outcome& now = outcomes[rcpttos.size() % outcomes.size()];
        if (now.throws) throw std::runtime_error("the recorder was told to throw");
        return now.status;
    }

    void log_info(std::string_view message, std::string_view type) override {
        if (!quiet) SMTPServer::log_info(message, type);
    }
};

int signal_pipe[2];

extern "C" void on_signal(int) {
    const int saved = errno;
    if (::write(signal_pipe[1], "", 1) < 0) errno = saved;
}

// Stops the server: at the first byte of a signal's pipe, or at the end of stdin.
class watch : public asyncore::file_dispatcher {
  public:
    watch(int fd, bool at_end, std::function<void()> stop)
        : file_dispatcher(fd), at_end_(at_end), stop_(std::move(stop)) {}
    bool writable() override { return false; }
    void handle_read() override {
        char buffer[4096];
        if (recv_into(buffer, sizeof buffer) > 0 && !at_end_) stop_();
    }
    void handle_close() override { stop_(); }

  private:
    bool at_end_;
    std::function<void()> stop_;
};

struct arguments {
    smtpd::options with;
    asyncore::address local{"127.0.0.1", 0};
    outcome result;
    std::string file;
    bool poll = false, stdin_eof = false, driver = false;
};

arguments parse(const std::vector<std::string>& args) {
    arguments given;
    for (std::size_t i = 0; i < args.size(); ++i) {
        const std::string& arg = args[i];
        const auto value = [&]() -> const std::string& {
            if (++i == args.size()) throw std::invalid_argument(arg + " needs a value");
            return args[i];
        };
        if (arg == "--host")
            given.local.host = value();
        else if (arg == "--port")
            given.local = {given.local.host, std::stoi(value())};
        else if (arg == "--size")
            given.with.data_size_limit = static_cast<std::size_t>(std::stoull(value()));
        else if (arg == "--fqdn")
            given.with.fqdn = value();
        else if (arg == "--status")
            given.result.status = value();
        else if (arg == "--throw")
            given.result.throws = true;
        else if (arg == "--smtputf8")
            given.with.enable_SMTPUTF8 = true;
        else if (arg == "--decode-data")
            given.with.decode_data = true;
        else if (arg == "--poll")
            given.poll = true;
        else if (arg == "--stdin-eof")
            given.stdin_eof = true;
        else if (arg == "--driver")
            given.driver = true;
        else if (arg.compare(0, 2, "--") == 0 || !given.file.empty())
            throw std::invalid_argument("what is " + arg + "?");
        else
            given.file = arg;
    }
    if (given.file.empty() != given.driver) throw std::invalid_argument("give a file, or --driver");
    return given;
}

int serve(const arguments& given) {
    std::ofstream file(given.file, std::ios::app | std::ios::binary);
    if (!file) throw std::runtime_error("cannot write to " + given.file);
    recording_server server(given.local, {}, given.with);
    server.outcomes = {given.result};
    server.record = [&](const std::string& json) {
        file << json << std::endl;
        if (!file) throw asyncore::ExitNow("cannot write to " + given.file);
    };

    if (::pipe(signal_pipe) < 0) throw std::system_error(errno, std::generic_category(), "pipe");
    ::fcntl(signal_pipe[1], F_SETFL, O_NONBLOCK);
    std::unique_ptr<watch> signals, input;
    const auto stop = [&] {
        for (auto* one : {signals.get(), input.get()})
            if (one) one->close();
        server.stop(std::chrono::seconds(2));
    };
    signals = std::make_unique<watch>(signal_pipe[0], false, stop);
    if (given.stdin_eof) input = std::make_unique<watch>(STDIN_FILENO, true, stop);
    for (const int number : {SIGTERM, SIGINT}) std::signal(number, on_signal);

    std::cout << "port " << server.socket->getsockname().port << std::endl;
    asyncore::loop(30.0, given.poll);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------
// The driver
// ---------------------------------------------------------------------------------------------------------
//
// Many sessions, one after the other, in one process: each client is one end of a socketpair, and after each
// event the loop runs until the server has nothing more to say. Events come on stdin, one a line; C is the
// number of a client, 0 to 3, HEX may be "-" for nothing:
//
//     session SIZE SMTPUTF8 DECODE_DATA RCPT_LIMIT POLL FQDN    four numbers, 0/1 for the flags; then a name
//     outcome none | throw | status HEX                         of process_message(); any number of them
//     open C            connect
//     write C HEX       send, and let the server answer
//     leave C HEX       send and close at once, without reading
//     shut C            close our side for writing
//     close C
//     confuse C HEX     between two lines only: put the channel into a state that is neither COMMAND nor DATA,
//                       send, and put it back
//     end               of the session
//
// For each event from `open` on, what came of it goes to stdout: `reply C HEX` (the pieces of a long one in order),
// `closed C` (once), `message JSON`; then `done`. `end` is answered by `end N`, N being the number of channels that
// outlived their clients, 0 if all is well.

class driver {
  public:
    // False: there are no more sessions.
    bool session(std::istream& in, std::ostream& out);

  private:
    struct client {
        asyncore::socket_type sock;
        recording_channel* channel = nullptr;
        bool open = false, eof = false;
    };

    void event(const std::string& name, client& with, const std::string& bytes);
    void connect(client& with);
    void send(client& with, std::string_view bytes);
    void confuse(client& with, const std::string& bytes);
    bool receive(std::size_t number);
    void settle();

    std::ostream* out_ = nullptr;
    asyncore::map_type map_;
    std::unique_ptr<recording_server> server_;
    std::array<client, 4> clients_;
    std::array<std::string, 4> heard_;
    bool poll_ = false;
};

bool driver::session(std::istream& in, std::ostream& out) {
    std::string line, name;
    out_ = &out;
    while (std::getline(in, line)) {
        std::istringstream words(line);
        words >> name;
        if (name == "session") {
            smtpd::options with;
            words >> with.data_size_limit >> with.enable_SMTPUTF8 >> with.decode_data >> with.rcpt_limit >> poll_ >>
                with.fqdn;
            with.map = &map_;
            server_ = std::make_unique<recording_server>(asyncore::address("127.0.0.1", 0), asyncore::address(), with);
            server_->quiet = true;
            server_->record = [&out](const std::string& json) { out << "message " << json << '\n'; };
        } else if (name == "outcome") {
            std::string kind, text;
            words >> kind >> text;
            outcome result;
            result.throws = kind == "throw";
            if (kind == "status") result.status = text == "-" ? "" : unhex(text);
            server_->outcomes.push_back(result);
        } else if (name == "end") {
            for (auto& one : clients_) {
                one.sock.close();
                one.open = false;
            }
            settle();
            out << "end " << map_.size() - 1 << '\n';
            server_.reset();
            for (auto& one : clients_) one = client();
            return true;
        } else {
            std::size_t number = 0;
            std::string text;
            words >> number >> text;
            event(name, clients_.at(number), text == "-" ? "" : unhex(text));
            settle();
            out << "done\n";
        }
        if (!words && !words.eof()) throw std::invalid_argument("cannot read: " + line);
    }
    return false;
}

void driver::event(const std::string& name, client& with, const std::string& bytes) {
    if (name == "open") return connect(with);
    if (!with.open) return;
    if (name == "write" || name == "leave") send(with, bytes);
    if (name == "confuse") confuse(with, bytes);
    if (name == "shut") ::shutdown(with.sock.fileno(), SHUT_WR);
    if (name == "close" || name == "leave") {
        with.sock.close();
        with.open = false;
    }
}

void driver::connect(client& with) {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0)
        throw std::system_error(errno, std::generic_category(), "socketpair");
    with.sock = asyncore::socket_type(fds[0]);
    with.sock.setblocking(false);
    with.open = true;
    asyncore::address from;
    from.family = AF_UNIX;
    server_->next_channel = &with.channel;
    server_->handle_accepted(std::make_unique<asyncore::socket_type>(fds[1]), from);
}

void driver::send(client& with, std::string_view bytes) {
    while (!bytes.empty()) {
        try {
            bytes.remove_prefix(with.sock.send(bytes));
        } catch (const std::system_error& error) {
            const int err = error.code().value();
            if (err != EAGAIN && err != EWOULDBLOCK) return;   // the server has closed
            settle();
        }
    }
}

void driver::confuse(client& with, const std::string& bytes) {
    const auto between_lines = [&with] {
        const recording_channel* channel = with.channel;
        return channel && channel->connected && channel->smtp_state == smtpd::SMTPChannel::COMMAND &&
               channel->num_bytes == 0 && channel->ac_in_buffer().empty();
    };
    if (!between_lines()) return;
    with.channel->smtp_state = 2;
    send(with, bytes);
    settle();
    if (with.channel) with.channel->smtp_state = smtpd::SMTPChannel::COMMAND;
}

// What the server has said to a client since; false: nothing.
bool driver::receive(std::size_t number) {
    client& from = clients_[number];
    if (!from.open || from.eof) return false;
    char buffer[65536];
    try {
        const std::size_t size = from.sock.recv(buffer, sizeof buffer);
        from.eof = size == 0;
        heard_[number].append(buffer, size);
        return true;
    } catch (const std::system_error& error) {
        const int err = error.code().value();
        if (err == EAGAIN || err == EWOULDBLOCK) return false;
        return from.eof = true;
    }
}

// Runs passes until nothing moves: three in a row in which no client was told anything and the server read nothing.
void driver::settle() {
    std::array<bool, 4> closed{};
    const auto unread = [this] {
        int total = 0, bytes = 0;
        for (const auto& one : clients_)
            if (one.open && ::ioctl(one.sock.fileno(), TIOCOUTQ, &bytes) == 0) total += bytes;
        return total;
    };
    int before = unread();
    for (int quiet = 0; quiet < 3; ++quiet) {
        poll_ ? asyncore::poll2(0.0, &map_) : asyncore::poll(0.0, &map_);
        for (std::size_t i = 0; i < clients_.size(); ++i)
            while (receive(i)) {
                quiet = -1;
                closed[i] = clients_[i].eof;
            }
        const int now = unread();
        if (now != before) quiet = -1;
        before = now;
    }
    for (std::size_t i = 0; i < clients_.size(); ++i) {
        if (!heard_[i].empty()) *out_ << "reply " << i << ' ' << hex(heard_[i]) << '\n';
        heard_[i].clear();
        if (closed[i]) *out_ << "closed " << i << '\n';
    }
}

}   // namespace

int main(int argc, char** argv) {
    try {
        std::signal(SIGPIPE, SIG_IGN);
        const arguments given = parse(std::vector<std::string>(argv + (argc > 0), argv + argc));
        if (!given.driver) return serve(given);
        std::ios::sync_with_stdio(false);
        std::cin.tie(nullptr);
        driver replay;
        while (replay.session(std::cin, std::cout)) {}
        std::cout.flush();
        return std::cout ? 0 : 1;
    } catch (const std::exception& error) {
        std::cerr << "recorder: " << error.what() << '\n';
        return 1;
    }
}
