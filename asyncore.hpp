// asyncore and asynchat: Python's select() loop and its chat sessions, in C++17.
//
//     struct echo : asyncore::dispatcher {
//         using dispatcher::dispatcher;
//         void handle_read() override { send(recv(8192)); }
//         bool writable() override { return false; }
//     };
//     struct server : asyncore::dispatcher {
//         void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) override {
//             _map->own(std::make_unique<echo>(std::move(sock), _map));
//         }
//     };
//
// Make a server, create_socket(), bind() and listen(), then asyncore::loop(): it returns when the map is empty.
//
// Ownership, in four sentences. A dispatcher enters its map in its constructor and leaves it in close() or in
// its destructor; the map does not own it. An object handed to map_type::own() lives until it closes, and is
// destroyed when the outermost pass over the map ends, so a handler may close anything, itself included, and
// go on running. An event reaches only the registration that it was collected for, whatever happened to the
// descriptor since. A map outlives its dispatchers, and belongs to one thread.
//
// Errors of the system are std::system_error. Bytes come as std::string_view, valid for the call.

#ifndef ASYNCORE_HPP
#define ASYNCORE_HPP

#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

struct pollfd;   // no <poll.h> here: AIX has macros in it that would rename a user's `events`

namespace asyncore {
inline namespace v1 {

class dispatcher;

using clock = std::chrono::steady_clock;
constexpr auto never = clock::time_point::max(), at_once = clock::time_point::min();   // deadlines

// The errnos that mean "the other side is gone". asyncore.py: _DISCONNECTED
bool DISCONNECTED(int err) noexcept;

// The text of an errno. asyncore.py: _strerror
std::string _strerror(int err);

// Thrown by a handler, it leaves the loop: the one exception that no dispatcher catches.
// asyncore.py: ExitNow
class ExitNow : public std::runtime_error {
  public:
    explicit ExitNow(const std::string& why = "ExitNow") : std::runtime_error(why) {}
};

// What an abstract method throws until a subclass overrides it (Python's builtin).
class NotImplementedError : public std::logic_error {
  public:
    explicit NotImplementedError(const std::string& what) : std::logic_error(what) {}
};

// The bytes as Python's repr() shows them: quotes, \n, \\, \xNN; never a control or a non-ASCII byte.
// `prefix` is "b" for bytes, "" for str.
std::string repr(std::string_view bytes, std::string_view prefix = "");

// ---------------------------------------------------------------------------------------------------------
// Addresses and sockets: the part of Python's socket module that asyncore stands on
// ---------------------------------------------------------------------------------------------------------

// (host, port) as Python writes it, the path of a UNIX socket, or nothing (None).
struct address {
    std::string host;             // a name, a numeric address, or a path
    int port = 0;                 // 0 to 65535
    int family = AF_UNSPEC;       // AF_UNSPEC: as a person wrote it, not resolved yet
    std::uint32_t flowinfo = 0;   // IPv6
    std::uint32_t scope_id = 0;   // IPv6

    address() = default;
    address(std::string host, int port);          // std::out_of_range unless 0 <= port <= 65535
    static address unix_path(std::string path);   // std::out_of_range when the path is too long
    static address from(const sockaddr_storage& storage, socklen_t size);

    bool none() const { return family == AF_UNSPEC && host.empty() && port == 0; }
    std::string repr() const;   // ('127.0.0.1', 1025), ('::1', 1025, 0, 0), '/run/x.sock', None
    std::string str() const;    // 127.0.0.1:1025; otherwise repr()
};

// What a name stands for, numeric, in the resolver's order. Blocks when the host is a name: POSIX has no other
// resolver. Throws std::system_error (EAI_ codes in the category that gai_category() names).
std::vector<address> getaddrinfo(const address& name, int family = AF_UNSPEC);
const std::error_category& gai_category() noexcept;

// This host's name, with its domain when the resolver knows it. May block.
std::string getfqdn();

// A descriptor, owned. Calls that a signal interrupts are repeated; no write raises SIGPIPE.
class socket_type {
  public:
    explicit socket_type(int fd = -1) noexcept;   // takes fd over
    socket_type(int family, int type);            // non-blocking, close-on-exec
    socket_type(socket_type&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    socket_type& operator=(socket_type&& other) noexcept;
    virtual ~socket_type();

    virtual std::size_t recv(char* buffer, std::size_t size, int flags = 0);   // 0: end of input
    virtual std::size_t send(std::string_view data, int flags = 0);
    virtual int getsockopt(int level, int option) const;
    // asyncore.py: file_wrapper.close, file_wrapper.fileno
    virtual void close();   // a second close does nothing
    virtual int fileno() const noexcept { return fd_; }
    // Whether there is input that select() can't see: what TLS has decrypted already, say.
    virtual bool pending() const { return false; }

    virtual void setsockopt(int level, int option, int value);
    virtual void setblocking(bool flag);
    virtual void bind(const address& addr);
    virtual void listen(int backlog);
    virtual int connect_ex(const address& addr);   // 0 or an errno
    // Non-blocking, close-on-exec; null when no client waits.
    virtual std::pair<std::unique_ptr<socket_type>, address> accept();
    virtual address getpeername() const;
    virtual address getsockname() const;

  protected:
    int fd_;
};

// ---------------------------------------------------------------------------------------------------------
// The socket map
// ---------------------------------------------------------------------------------------------------------

// Descriptor -> dispatcher, in the order of descriptors.
class map_type {
  public:
    map_type();
    ~map_type();
    map_type(const map_type&) = delete;
    map_type& operator=(const map_type&) = delete;

    bool empty() const noexcept { return size_ == 0; }
    std::size_t size() const noexcept { return size_; }
    dispatcher* get(int fd) const noexcept;   // nullptr when there is none
    // The number of the registration that has this descriptor; 0: none has. Neither a descriptor nor a pointer tells a
    // newcomer from the departed; this does.
    std::uint64_t registration(int fd) const noexcept;
    std::vector<dispatcher*> values() const;

    // From here on the object lives until it closes (see the top of this file).
    void own(std::unique_ptr<dispatcher> object);

    // Everything leaves the map without being closed. What the map owns is destroyed: at once, or after the pass under
    // way.
    void clear();

    // The loop's own, in asyncore.cpp.
    struct visit;
    struct pass;
    struct receive_buffer;

  private:
    friend class dispatcher;
    friend void close_all(map_type*, bool);
    struct slot {
        dispatcher* object = nullptr;
        std::uint64_t registration = 0;
    };
    void add(int fd, dispatcher& object);
    void remove(int fd, const dispatcher& object) noexcept;
    void touch(int fd) noexcept;
    void destroy_closed() noexcept;

    std::vector<slot> slots_;   // by descriptor
    // Of late active: see loop().
    std::vector<int> hot_;              // descriptors; there is room for all
    std::vector<unsigned char> heat_;   // by descriptor: full passes until it leaves hot_; 0: it is not there
    std::size_t size_ = 0;
    std::uint64_t registrations_ = 0;   // so far; 0 is the number of none
    int depth_ = 0;                     // passes under way, one inside the other
    std::list<std::unique_ptr<dispatcher>> owned_, closed_;
    std::vector<pollfd> wanted_;   // pass::wanted between two passes, so that it is allocated once
    std::vector<char> buffer_;     // the receive buffer, when it is not lent
};

// The map used when none is given: it exists before the first object that needs it, whatever the link order.
map_type& default_socket_map();
inline map_type& socket_map = default_socket_map();

// ---------------------------------------------------------------------------------------------------------
// The loop
// ---------------------------------------------------------------------------------------------------------

// One event, delivered to one object. What the handler throws goes to its handle_error(), but ExitNow passes.
void read(dispatcher& obj);
void write(dispatcher& obj);
// asyncore.py: _exception
void _exception(dispatcher& obj);
void readwrite(dispatcher& obj, short flags);

// One pass: wait at most `timeout` seconds (none: for ever) for events, deliver them, then the timeouts that
// are due. An empty map returns at once. `poll` uses select() and hands over to `poll2` when a descriptor is
// beyond FD_SETSIZE; `poll2` uses poll(). A null map is socket_map. asyncore.py: poll, poll2, poll3
void poll(std::optional<double> timeout = 0.0, map_type* map = nullptr);
void poll2(std::optional<double> timeout = 0.0, map_type* map = nullptr);
inline void poll3(std::optional<double> timeout = 0.0, map_type* map = nullptr) { poll2(timeout, map); }

// Passes, until the map is empty or `count` of them are done. asyncore.py: loop
void loop(std::optional<double> timeout = 30.0, bool use_poll = false, map_type* map = nullptr,
          std::optional<int> count = std::nullopt);

// Closes everything in the map. An exception of a close() is passed on, the rest then still open, unless
// ignore_all; EBADF is always ignored, ExitNow never. asyncore.py: close_all
void close_all(map_type* map = nullptr, bool ignore_all = false);

// Where log_info() writes instead of stdout, when it is set: message and type. Set it before any loop runs.
extern std::function<void(std::string_view message, std::string_view type)> log_handler;

// ---------------------------------------------------------------------------------------------------------
// dispatcher
// ---------------------------------------------------------------------------------------------------------

// A socket and the handlers of its events. asyncore.py: dispatcher
class dispatcher {
  public:
    bool debug = false;
    bool connected = false;
    bool accepting = false;
    bool connecting = false;
    bool closing = false;   // never set, as in Python: for subclasses
    address addr;           // the peer; of a listener: what was given to bind()
    std::vector<std::string> ignore_log_types{"warning"};
    std::unique_ptr<socket_type> socket;
    std::pair<int, int> family_and_type{0, 0};   // what create_socket() was given

    // Makes the socket, if there is one, non-blocking and registers it. A null map is socket_map.
    explicit dispatcher(std::unique_ptr<socket_type> sock = nullptr, map_type* map = nullptr);
    virtual ~dispatcher();
    dispatcher(const dispatcher&) = delete;
    dispatcher& operator=(const dispatcher&) = delete;

    // <asyncore.dispatcher connected 127.0.0.1:1025 at 0x...>; the name comes from class_name().
    // asyncore.py: dispatcher.__repr__
    std::string repr() const;
    virtual std::string class_name() const { return "asyncore.dispatcher"; }

    // close() unregisters from _map only. If you have registered with another map too, call del_channel(that_map).
    virtual void add_channel(map_type* map = nullptr);
    virtual void del_channel(map_type* map = nullptr);
    void create_socket(int family = AF_INET, int type = SOCK_STREAM);
    // The socket that create_socket() takes: override it for one of your own. Not in Python.
    virtual std::unique_ptr<socket_type> make_socket(int family, int type);
    virtual void set_socket(std::unique_ptr<socket_type> sock, map_type* map = nullptr);
    void set_reuse_addr();

    // These and deadline() are asked before each wait: is a read, or a write event wanted? What they throw leaves the
    // loop.
    virtual bool readable() { return true; }
    virtual bool writable() { return true; }

    // When handle_timeout() is due. Not in Python.
    virtual clock::time_point deadline() { return never; }

    virtual void listen(int num);
    virtual void bind(const address& addr);
    virtual void connect(const address& addr);
    // Nothing when no client waits, or the one that did has gone.
    virtual std::optional<std::pair<std::unique_ptr<socket_type>, address>> accept();
    // The bytes that were taken; 0 when none were.
    virtual std::size_t send(std::string_view data);
    // "" after the end of input, handle_close() then has been called. Throws EAGAIN when there is nothing yet.
    std::string recv(std::size_t buffer_size);
    // The same into a buffer of the caller's (Python's socket.recv_into): override this one to filter input.
    virtual std::size_t recv_into(char* buffer, std::size_t size);
    // Closes the socket and leaves the map; allocates nothing; twice is harmless.
    virtual void close();

    // To stderr.
    virtual void log(std::string_view message);
    // To log_handler, or stdout without one, unless the type is one of ignore_log_types.
    virtual void log_info(std::string_view message, std::string_view type = "info");

    // What the loop calls.
    virtual void handle_read_event();
    virtual void handle_connect_event();
    virtual void handle_write_event();
    virtual void handle_expt_event();

    // What a subclass overrides. handle_error() finds what was thrown in std::current_exception(); unless it is
    // overridden, it logs that, then calls handle_close().
    virtual void handle_error();
    virtual void handle_expt();
    virtual void handle_read();
    virtual void handle_write();
    virtual void handle_connect();
    virtual void handle_accept();   // accept(), then handle_accepted()
    virtual void handle_accepted(std::unique_ptr<socket_type> sock, const address& addr);
    virtual void handle_close();
    virtual void handle_timeout();   // deadline() has passed: closes, unless overridden. Not in Python.

    int _fileno = -1;
    map_type* _map;

  protected:
    // "std::system_error:what()" of the exception being handled, fit to print.
    static std::string current_exception_text();
    // Logs it, after `what` and repr(), as far as that can be done.
    void log_exception(std::string_view what);
    // Throws std::logic_error when there is none.
    socket_type& the_socket() const;

  private:
    friend class map_type;
    bool owned_ = false;
    std::list<std::unique_ptr<dispatcher>>::iterator self_{};   // in map_type::owned_
};

// Simple buffered output, for simple clients. asyncore.py: dispatcher_with_send
class dispatcher_with_send : public dispatcher {
  public:
    std::string out_buffer;

    using dispatcher::dispatcher;
    std::string class_name() const override { return "asyncore.dispatcher_with_send"; }
    void initiate_send();
    void handle_write() override;
    bool writable() override;
    std::size_t send(std::string_view data) override;   // takes all of it
};

// A file, pipe or terminal with a socket's face; the descriptor given is duplicated. asyncore.py: file_wrapper
class file_wrapper : public socket_type {
  public:
    explicit file_wrapper(int fd);
    std::size_t recv(char* buffer, std::size_t size, int flags = 0) override;
    std::size_t send(std::string_view data, int flags = 0) override;
    std::size_t read(char* buffer, std::size_t size) { return recv(buffer, size); }
    std::size_t write(std::string_view data) { return send(data); }
    // SO_ERROR is 0; anything else is NotImplementedError.
    int getsockopt(int level, int option) const override;
};

// A dispatcher for a file: made non-blocking. asyncore.py: file_dispatcher
class file_dispatcher : public dispatcher {
  public:
    explicit file_dispatcher(int fd, map_type* map = nullptr);
    std::string class_name() const override { return "asyncore.file_dispatcher"; }
    void set_file(int fd);
};

// Wakes a loop from another thread (after the trigger of medusa, by asyncore's author). Not in asyncore.py.
class trigger : public file_dispatcher {
  public:
    explicit trigger(map_type* map = nullptr);
    std::string class_name() const override { return "asyncore.trigger"; }
    bool writable() override { return false; }
    // For any thread: the loop calls the thunks in order. It never blocks. What a thunk throws goes to handle_error(),
    // which logs it; ExitNow leaves the loop, and the thunks behind it run when that is entered again.
    void pull_trigger(std::function<void()> thunk = {});
    void handle_read() override;
    void handle_error() override;
    void close() override;   // pull_trigger() then does nothing

  private:
    trigger(std::pair<socket_type, socket_type> pipe, map_type* map);
    void wake() noexcept;
    socket_type write_end_;
    std::mutex lock_;
    std::deque<std::function<void()>> thunks_;
};

}   // namespace v1
}   // namespace asyncore

// ---------------------------------------------------------------------------------------------------------
// asynchat: sessions that speak in lines, or in anything else that ends
// ---------------------------------------------------------------------------------------------------------

namespace asynchat {
inline namespace v1 {

// Makes output when there is room for it: "" is the end.
class producer {
  public:
    virtual ~producer() = default;
    virtual std::string more() = 0;
};

// Gives its data in pieces. asynchat.py: simple_producer
class simple_producer : public producer {
  public:
    explicit simple_producer(std::string data, std::size_t buffer_size = 512);
    std::string more() override;

  private:
    std::string data_;
    std::size_t buffer_size_, sent_ = 0;
};

// How many bytes at the end of `haystack` may begin `needle`, the whole needle excepted.
std::size_t find_prefix_at_end(std::string_view haystack, std::string_view needle);

// A session: input is cut at a terminator, output is queued. Derive from it and override
// collect_incoming_data() and found_terminator(). Any call that sends may find the peer gone and close the
// object: look at `connected` when it matters. asynchat.py: async_chat
class async_chat : public asyncore::dispatcher {
  public:
    // None: no end; a number of bytes; or the bytes that end the input.
    using terminator = std::variant<std::monostate, std::size_t, std::string>;
    struct close_mark {};
    using fifo_item = std::variant<std::string, std::shared_ptr<producer>, close_mark>;

    std::size_t ac_in_buffer_size = 65536;    // bytes asked of one recv()
    std::size_t ac_out_buffer_size = 65536;   // bytes given to one send()
    std::size_t ac_out_queue_limit = 0;       // bytes queued past which input waits too; 0: none. Not in Python.
    std::string incoming;                     // see _collect_incoming_data()
    std::deque<fifo_item> producer_fifo;      // output not sent yet

    explicit async_chat(std::unique_ptr<asyncore::socket_type> sock = nullptr, asyncore::map_type* map = nullptr);
    std::string class_name() const override { return "asynchat.async_chat"; }

    virtual void collect_incoming_data(std::string_view data);
    void _collect_incoming_data(std::string_view data);
    std::string _get_data();
    virtual void found_terminator();

    // A number is used up as it is met: then 0, no terminator. Negative: std::invalid_argument.
    void set_terminator(std::string_view term);
    void set_terminator(std::ptrdiff_t count);
    void set_terminator(std::nullopt_t none);
    const terminator& get_terminator() const { return terminator_; }

    void handle_read() override;
    void handle_write() override;
    void handle_close() override;
    // What is queued goes to the old socket first. Throws EAGAIN when that takes no more.
    void set_socket(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map = nullptr) override;
    void handle_expt() override;   // takes the urgent byte away, or it would be announced for ever
    asyncore::clock::time_point deadline() override;
    void handle_timeout() override;

    // Output is sent at once, as far as it goes; the rest when there is room.
    virtual void push(std::string_view data);
    void push_with_producer(std::shared_ptr<producer> source);
    bool readable() override;
    bool writable() override;
    void close_when_done();
    void initiate_send();
    void discard_buffers();
    void discard_input();   // what has been received and not been handled; output stays. Not in Python.

    // What has been received and not been looked at yet (Python: an attribute).
    std::string_view ac_in_buffer() const { return input_; }
    // The bytes of output that wait, producers aside.
    std::size_t queued() const;

    // While it is paused, a session reads nothing and handles nothing; what it has received waits. After
    // resume() the loop goes on with that first. A paused session waits for no input, so it does not see the end of it.
    // A peer that resets or hangs up is noticed within a second or two: handle_close(). A subclass whose deadline shall
    // stand still meanwhile asks paused(). Not in Python.
    void pause();
    virtual void resume() { paused_ = false; }
    bool paused() const { return paused_; }

  protected:
    // Nothing more is read: what is queued is sent, and then the session ends.
    void end_input() { input_over_ = true; }
    bool input_over() const { return input_over_; }
    // Puts bytes in front of the input, as if they had not been read yet.
    void unread(std::string_view bytes);
    // push() without sending: initiate_send() does that.
    void queue(std::string_view data);
    // Input has waited, and need not any longer.
    bool must_go_on() const { return input_waits_ && !stalled(); }

  private:
    // Input has to wait: the session is paused, or over, or more than ac_out_queue_limit is queued.
    bool stalled() const { return paused_ || input_over_ || (ac_out_queue_limit && queued() > ac_out_queue_limit); }
    void consume();
    bool consume_some();
    void keep_input();
    bool send_some();
    bool send_first();
    void refill();

    terminator terminator_;
    bool paused_ = false;        // pause() to resume()
    bool input_over_ = false;    // end_input()
    bool input_waits_ = false;   // consume() has stopped for one of these; it goes on in handle_timeout()
    asyncore::clock::time_point look_again_at_{};   // when to see if a paused session still has its peer
    std::string kept_;                              // input between two reads
    std::string_view input_;                        // what is to be consumed: in kept_, or in the loop's receive buffer
    std::string spare_;                             // an empty string with room, so that a reply needs no allocation
    std::size_t consumed_ = 0;   // bytes in front of input_ that have been handled and are still there
    std::size_t sent_ = 0;       // bytes of the first item that have gone
    bool sending_ = false;       // initiate_send() is under way, and the queue has not been discarded in it
};

}   // namespace v1
}   // namespace asynchat

#endif
