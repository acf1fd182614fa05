// soak_server: the server that soak.py watches. It writes the key (soak.hpp) of each message to a file.
//
//   soak_server [option ...]
//
//   --poll             asyncore::loop() with poll(); else with select()
//   --proxy HOST:PORT  a PureProxy into that server, which is the one to write keys
//   --keys FILE        where they go
//   --idle SECONDS     options::idle_timeout
//   --size BYTES       options::data_size_limit
//   --rcpts COUNT      options::rcpt_limit
//   --files COUNT      how many descriptors it may have; as many as possible by default
//   --fault NAME       does something wrong on purpose, for soak.py --selftest (see fault below)
//
// It prints `port N`; then, for each line on standard input, `heap N map N`: bytes of heap in use, and dispatchers.
// SIGTERM ends it as it ends smtpd, and so does the end of standard input: a parent that dies leaves nothing behind.

#include <fcntl.h>
#include <malloc.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <thread>

#include "smtpd.hpp"
#include "soak.hpp"

namespace {

std::FILE* keys;

// fd: every 100th connection leaks a descriptor. memory: each connection leaks 32 KB. drop, twice, damage: every
// 50th message is acknowledged and lost, delivered twice, delivered with another text. stall: every 500th message
// takes 2.5 seconds. idle: nobody is ever timed out. exit: the exit status is 3.
std::string fault;

bool every(int& counter, int nth, const char* name) { return fault == name && ++counter % nth == 0; }

std::size_t heap_in_use() {
#ifdef __GLIBC_PREREQ
#if __GLIBC_PREREQ(2, 33)
    const struct mallinfo2 info = ::mallinfo2();
    return info.uordblks + info.hblkhd;
#endif
#endif
    return 0;   // not known here
}

struct soak_server : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;

    std::optional<std::string> process_message(const asyncore::address& /*peer*/, const std::string& /*mailfrom*/,
                                               const std::vector<std::string>& /*rcpttos*/, std::string&& data,
                                               const smtpd::message_options& /*kwargs*/) override {
        const std::size_t header = data.find(id_header), blank = data.find("\n\n");
        if (header == data.npos || blank == data.npos) return "554 Error: not one of ours";
        const std::string_view id = std::string_view(data).substr(header + id_header.size());
        std::string_view text = std::string_view(data).substr(blank + 2);
        static int count = 0;
        if (every(count, 50, "damage")) text = text.substr(text.size() / 2);
        const std::string line = message_key(id.substr(0, id.find('\n')), text) + "\n";
        if (every(count, 500, "stall")) std::this_thread::sleep_for(std::chrono::milliseconds(2500));
        if (every(count, 50, "drop")) return std::nullopt;
        if (every(count, 50, "twice")) std::fputs(line.c_str(), keys);
        if (std::fputs(line.c_str(), keys) < 0) return "451 Error: the disk is full";
        return std::nullopt;
    }

    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        static int count = 0;
        if (every(count, 100, "fd")) (void)!::open("/dev/null", O_RDONLY);
        if (fault == "memory") static_cast<void>(new std::string(32768, 'x'));
        return SMTPServer::channel_class(std::move(sock), from);
    }
};

int signal_pipe[2];

extern "C" void on_signal(int) {
    const int saved = errno;
    if (::write(signal_pipe[1], "", 1) < 0) errno = saved;   // it is full: the loop has enough to read
}

// Standard input and signals: what the parent has to say.
struct control : asyncore::file_dispatcher {
    control(int fd, smtpd::SMTPServer& server, bool stops) : file_dispatcher(fd), server_(server), stops_(stops) {}
    bool writable() override { return false; }
    void handle_read() override {
        const std::string lines = recv(100);
        if (stops_ || lines.empty()) return handle_close();
        std::fflush(keys);
        std::printf("heap %zu map %zu\n", heap_in_use(), _map->size());
        std::fflush(stdout);
    }
    void handle_close() override {
        if (std::exchange(stopping, true)) return;
        server_.stop(std::chrono::seconds(10));
        asyncore::dispatcher* const both[] = {other, this};
        for (auto* it : both) it->close();
    }

    control* other = nullptr;

  private:
    static inline bool stopping = false;
    smtpd::SMTPServer& server_;
    bool stops_;
};

asyncore::address parse_address(const std::string& text) {
    const std::size_t colon = text.rfind(':');
    return {text.substr(0, colon), std::atoi(text.c_str() + colon + 1)};
}

}   // namespace

int main(int argc, char** argv) {
    bool use_poll = false;
    rlim_t files = 0;
    asyncore::address upstream;
    smtpd::options options;
    options.fqdn = "soak.test";
    keys = std::fopen("/dev/null", "w");
    for (int i = 1; i < argc; ++i) {
        const std::string option = argv[i];
        if (option == "--poll") {
            use_poll = true;
            continue;
        }
        const std::string value = ++i < argc ? argv[i] : "";
        const auto number = std::strtoul(value.c_str(), nullptr, 10);
        if (option == "--proxy") upstream = parse_address(value);
        if (option == "--keys") keys = std::freopen(value.c_str(), "w", keys);
        if (option == "--idle") options.idle_timeout = std::chrono::seconds(number);
        if (option == "--size") options.data_size_limit = number;
        if (option == "--rcpts") options.rcpt_limit = number;
        if (option == "--files") files = number;
        if (option == "--fault") fault = value;
    }
    limit_files(files);
    if (fault == "idle") options.idle_timeout = {};
    std::cout.rdbuf(std::cerr.rdbuf());   // the log; standard output is for the parent
    if (!keys || ::pipe2(signal_pipe, O_CLOEXEC | O_NONBLOCK) < 0) return 1;
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGTERM, on_signal);

    std::unique_ptr<smtpd::SMTPServer> server;
    if (upstream.none())
        server = std::make_unique<soak_server>(asyncore::address("127.0.0.1", 0), upstream, options);
    else
        server = std::make_unique<smtpd::PureProxy>(asyncore::address("127.0.0.1", 0), upstream, options);
    control parent(STDIN_FILENO, *server, false), signals(signal_pipe[0], *server, true);
    parent.other = &signals;
    signals.other = &parent;
    std::printf("port %d\n", server->socket->getsockname().port);
    std::fflush(stdout);
    asyncore::loop(30.0, use_poll);
    return std::fclose(keys) != 0 ? 1 : fault == "exit" ? 3 : 0;
}
