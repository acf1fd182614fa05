#include "asyncore.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/select.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <ctime>
#include <iostream>

namespace asyncore {
inline namespace v1 {

std::function<void(std::string_view, std::string_view)> log_handler;

namespace {

[[noreturn]] void raise(int err, const char* call) { throw std::system_error(err, std::generic_category(), call); }

// A system call is repeated when a signal interrupts it (PEP 475).
template <typename Call>
auto uninterrupted(Call call) -> decltype(call()) {
    for (;;) {
        const auto result = call();
        if (result >= 0 || errno != EINTR) return result;
    }
}

std::size_t checked(ssize_t result, const char* call) {
    if (result < 0) raise(errno, call);
    return static_cast<std::size_t>(result);
}

// The processor time that this thread has had.
std::chrono::nanoseconds processor_time() {
    timespec spent{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &spent);
    return std::chrono::seconds(spent.tv_sec) + std::chrono::nanoseconds(spent.tv_nsec);
}

// POSIX allows the two to be different numbers.
bool would_block(int err) { return err == EAGAIN || err == EWOULDBLOCK; }

// Does what may fail without harm. False: it has failed. ExitNow passes through.
template <typename Act>
bool quietly(Act act) {
    try {
        act();
        return true;
    } catch (const ExitNow&) {
        throw;
    } catch (...) {
        return false;
    }
}

// The flag is often set as it should be, and then one call is enough.
void set_nonblocking(int fd, bool flag) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0) raise(errno, "fcntl");
    const int wanted = flag ? flags | O_NONBLOCK : flags & ~O_NONBLOCK;
    if (wanted != flags && ::fcntl(fd, F_SETFL, wanted) < 0) raise(errno, "fcntl");
}

}   // namespace

// Errors that only say that the peer is gone are no errors for a server: send() and recv() call handle_close() for
// them. EBADF is among them, as in Python, because a handler may have closed the socket in the same event.
bool DISCONNECTED(int err) noexcept {
    return err == ECONNRESET || err == ENOTCONN || err == ESHUTDOWN || err == ECONNABORTED || err == EPIPE ||
           err == EBADF;
}

std::string _strerror(int err) { return std::generic_category().message(err); }

// ---------------------------------------------------------------------------------------------------------
// The loop
// ---------------------------------------------------------------------------------------------------------

namespace {

map_type& map_or_default(map_type* map) { return map ? *map : default_socket_map(); }

// The one place where the loop catches what a handler throws. ExitNow is the way out of loop(), so it passes. Anything
// else belongs to the object: its handle_error() logs it and closes, and the other objects go on.
void deliver(dispatcher& obj, void (dispatcher::*event)()) {
    try {
        (obj.*event)();
    } catch (const ExitNow&) {
        throw;
    } catch (...) {
        obj.handle_error();
    }
}

}   // namespace

void read(dispatcher& obj) { deliver(obj, &dispatcher::handle_read_event); }

void write(dispatcher& obj) { deliver(obj, &dispatcher::handle_write_event); }

void _exception(dispatcher& obj) { deliver(obj, &dispatcher::handle_expt_event); }

// What poll() reports for one object, which may be several things at a time. The order is Python's: input first, so
// that what a peer has sent before it hung up is read.
void readwrite(dispatcher& obj, short flags) {
    // Python does not look again between the steps; here an object that one step closed is left alone.
    // An object that had no registration when this began never counts as gone.
    const map_type& map = *obj._map;
    const int fd = obj._fileno;
    const auto registration = map.get(fd) == &obj ? map.registration(fd) : 0;
    const auto gone = [&] { return registration != 0 && map.registration(fd) != registration; };
    try {
        if (flags & POLLIN) obj.handle_read_event();
        if (flags & POLLOUT && !gone()) obj.handle_write_event();
        if (flags & POLLPRI && !gone()) obj.handle_expt_event();
        // Python closes at once, and what is still to be read is lost; here reading finds the end.
        if (flags & (POLLHUP | POLLERR | POLLNVAL) && !(flags & POLLIN) && !gone()) obj.handle_close();
    } catch (const ExitNow&) {
        throw;
    } catch (const std::system_error& error) {
        if (gone()) return;
        if (error.code().category() == std::generic_category() && DISCONNECTED(error.code().value()))
            deliver(obj, &dispatcher::handle_close);
        else
            obj.handle_error();
    } catch (...) {
        obj.handle_error();
    }
}

// The life of an object. Its constructor registers it: the map's slot for its descriptor points to it and has a number
// that no other registration gets. close() empties that slot at once and closes the descriptor, so the system may give
// the same descriptor to another object before the pass is over. The object itself may still be running: a handler that
// closes it is one of its own functions. So close() only moves an object that the map owns to the list closed_ (a list
// node changes its list; nothing is allocated and nothing can fail). The list is emptied when the outermost pass over
// the map ends, which is when no function of any of them can be running. An object that its maker owns is not touched.
//
// While a visit lives, what closes is not destroyed. Visits nest: a handler may run loop() itself.
struct map_type::visit {
    map_type& map;

    explicit visit(map_type& m) : map(m) { ++map.depth_; }
    ~visit() {
        --map.depth_;
        map.destroy_closed();
    }
    visit(const visit&) = delete;
    visit& operator=(const visit&) = delete;
};

// Bytes to receive into, lent for a while. The vector leaves the map meanwhile, so a nested pass finds none there and
// makes another one. The larger of the two is kept.
struct map_type::receive_buffer {
    map_type& map;
    std::vector<char> bytes;

    receive_buffer(map_type& m, std::size_t size) : map(m), bytes(std::move(m.buffer_)) {
        if (bytes.size() < size) bytes.resize(size);
    }
    ~receive_buffer() {
        if (map.buffer_.size() < bytes.size()) map.buffer_.swap(bytes);
    }
    receive_buffer(const receive_buffer&) = delete;
    receive_buffer& operator=(const receive_buffer&) = delete;
};

// One pass over a map has four steps.
//
//   collect   asks each object whether it wants to read and to write, and when its deadline is
//   wait      waits in select() or poll() until an event comes, or until the nearest deadline
//   deliver   calls read(), write() and _exception() for the objects that have an event
//   expire    calls handle_timeout() of those whose deadline has passed
//
// Any handler may close any object and make new ones. So an event is not delivered to a descriptor, nor to a pointer:
// it is delivered to the object that has the descriptor now, if that was registered before the pass began to collect. A
// newcomer on the same descriptor has a higher number and gets nothing that was meant for another.
//
// Timers are not kept anywhere. Each object answers deadline() anew before each wait, so there is no list to keep in
// order and none to clean up when an object closes. It costs a call for each object in each pass, as readable() does.
//
// A short pass does the same for the hot ones alone: see loop().
struct map_type::pass : visit {
    const double patience;   // seconds that a short pass waits at most; negative: it is a full one
    const bool large;        // otherwise a pass costs too little to save any
    std::vector<pollfd> wanted;
    int highest = -1;           // descriptor of these
    int left_to_do = 0;         // events that have come and not been looked at
    bool dry = true;            // no event has come, nor a timeout
    std::uint64_t newest = 0;   // the last registration that was asked
    clock::time_point nearest = clock::time_point::max();
    clock::time_point woken{};
    std::chrono::nanoseconds cost{};   // of a full pass over a large map, handlers aside, in processor time

    explicit pass(map_type& m, double p = -1) : visit(m), patience(p), large(m.size_ >= 32) {
        wanted.swap(map.wanted_);
        wanted.clear();
    }

    ~pass() { wanted.swap(map.wanted_); }

    // Python: poll2 takes a negative timeout for none, as poll() does; select() has no such time.
    void run(std::optional<double> timeout, bool use_poll) {
        if (!(timeout.value_or(0) >= 0)) {
            if (!use_poll) throw std::invalid_argument("timeout must be non-negative");
            timeout.reset();
        }
        if (map.empty()) return;
        if (!full()) timeout = std::min(timeout.value_or(patience), patience);
        collect();
        if (use_poll || highest >= FD_SETSIZE)
            poll(timeout);   // Python's select() dies of such a descriptor: ValueError
        else
            select(timeout);
        expire();
    }

    bool full() const { return patience < 0; }
    bool many_hot() const { return map.hot_.size() > map.size_ / 4; }

    // The descriptors that this pass is about: all of them, in order, or the hot ones. A handler may change either.
    std::size_t size() const { return full() ? map.slots_.size() : map.hot_.size(); }
    int at(std::size_t i) const { return full() ? static_cast<int>(i) : map.hot_[i]; }

    // Asks everyone. An object that closes while it is asked is left out; one that is registered meanwhile is asked in
    // the next pass, so that an object that makes another one each time does not keep the loop from waiting.
    void collect() {
        newest = map.registrations_;   // who registers from now on is a newcomer
        if (large && full()) {
            cost = -processor_time();
            const auto cold = [this](int fd) { return --map.heat_[static_cast<std::size_t>(fd)] == 0; };
            map.hot_.erase(std::remove_if(map.hot_.begin(), map.hot_.end(), cold), map.hot_.end());
        }
        for (std::size_t i = 0; i < size(); ++i) {
            const int fd = at(i);
            const slot asked = map.slots_[static_cast<std::size_t>(fd)];
            if (!asked.object) continue;
            short events = 0;
            if (asked.object->readable()) events |= POLLIN | POLLPRI;
            if (asked.object->writable() && !asked.object->accepting) events |= POLLOUT;
            const auto due = asked.object->deadline();
            if (map.registration(fd) != asked.registration) continue;   // closed by one of the three
            if (large && asked.object->accepting) map.touch(fd);
            nearest = std::min(nearest, due);
            if (events == 0) continue;
            try {
                wanted.push_back({fd, events, 0});
                highest = std::max(highest, fd);
            } catch (const std::bad_alloc&) {
                // Those that there is room for have their turn; the others soon.
                nearest = std::min(nearest, clock::now() + std::chrono::milliseconds(100));
            }
        }
    }

    // Waits for `timeout` seconds, or until the nearest deadline. sleep() is select() or poll(); it is given the
    // microseconds that are left, a negative number for ever, and is called again when a signal interrupts it. Times
    // are rounded up: a wait that ended a little too early would make the loop spin until the deadline.
    template <typename Wait>
    void wait(std::optional<double> timeout, Wait sleep) {
        using namespace std::chrono;
        constexpr double for_ever = 1e9;   // 31 years
        constexpr hours longest(24);       // macOS refuses to wait for more than 100,000,000 s
        auto until = nearest;
        if (timeout && *timeout < for_ever)
            until = std::min(until, clock::now() + duration_cast<clock::duration>(duration<double>(*timeout)));
        for (;;) {
            microseconds left{-1};
            if (until != clock::time_point::max()) {
                const auto now = clock::now();
                left = until <= now ? left.zero() : ceil<microseconds>(std::min<clock::duration>(until - now, longest));
            }
            left_to_do = sleep(left);
            const int err = errno;
            woken = clock::now();
            if (left_to_do > 0 || (left_to_do == 0 && woken >= until)) break;
            if (left_to_do == 0) continue;
            if (err == EAGAIN || err == ENOMEM) {
                // Python: the loop ends. The system is short of something, and may have it again soon.
                const timespec moment{0, 10000000};
                ::nanosleep(&moment, nullptr);
            } else if (err != EINTR && !(err == EBADF && drop_closed())) {   // one bad descriptor fails them all
                raise(err, "poll");
            }
        }
        if (cost.count() != 0) cost += processor_time();
    }

    // Forgets those that another one's readable(), writable() or deadline() has closed. Python: the loop ends.
    bool drop_closed() {
        const auto closed = [this](const pollfd& want) { return !object_for(want); };
        const auto kept = std::remove_if(wanted.begin(), wanted.end(), closed);
        const bool any = kept != wanted.end();
        wanted.erase(kept, wanted.end());
        return any;
    }

    // The object that an event was collected for; null if it has closed since, even if its descriptor is in use again.
    dispatcher* object_for(const pollfd& want) const {
        return map.registration(want.fd) <= newest ? map.get(want.fd) : nullptr;
    }

    // The next one that has an event, which makes it hot.
    dispatcher* active(const pollfd& want) {
        --left_to_do;
        dry = false;
        if (large) map.touch(want.fd);
        return object_for(want);
    }

    // Waits in select() and delivers reads, then writes, then exceptional conditions, as Python does. The sets are made
    // in the call itself, since select() overwrites them and a signal may interrupt it. It tells how many bits are set,
    // so the search for them ends at the last one.
    void select(std::optional<double> timeout) {
        fd_set r, w, e;
        wait(timeout, [&](std::chrono::microseconds left) {
            FD_ZERO(&r);
            FD_ZERO(&w);
            FD_ZERO(&e);
            for (const auto& want : wanted) {
                if (want.events & POLLIN) FD_SET(want.fd, &r);
                if (want.events & POLLOUT) FD_SET(want.fd, &w);
                FD_SET(want.fd, &e);
            }
            timeval tv{static_cast<decltype(tv.tv_sec)>(left.count() / 1000000),
                       static_cast<decltype(tv.tv_usec)>(left.count() % 1000000)};
            return ::select(highest + 1, &r, &w, &e, left.count() < 0 ? nullptr : &tv);
        });
        const auto deliver_to = [&](const fd_set& ready, void (*event)(dispatcher&)) {
            for (std::size_t i = 0; left_to_do > 0 && i < wanted.size(); ++i) {
                if (!FD_ISSET(wanted[i].fd, &ready)) continue;
                if (dispatcher* obj = active(wanted[i])) event(*obj);
            }
        };
        deliver_to(r, asyncore::read);
        deliver_to(w, asyncore::write);
        deliver_to(e, asyncore::_exception);
    }

    // The same with poll(), which has no limit on descriptors. It reports one object's events together, so these are
    // delivered object by object, where select() delivers all the reads first. Its milliseconds are an int: a longer
    // wait is made of several.
    void poll(std::optional<double> timeout) {
        wait(timeout, [&](std::chrono::microseconds left) {
            const auto ms = left.count() < 0 ? -1 : std::min<long long>((left.count() + 999) / 1000, 1 << 30);
            return ::poll(wanted.data(), static_cast<nfds_t>(wanted.size()), static_cast<int>(ms));
        });
        for (std::size_t i = 0; left_to_do > 0 && i < wanted.size(); ++i) {
            if (wanted[i].revents == 0) continue;
            if (dispatcher* obj = active(wanted[i])) readwrite(*obj, wanted[i].revents);
        }
    }

    // Timeouts are judged by the time at which the wait ended, so that a slow handler does not make other objects time
    // out. What remains in `nearest` is the nearest of those that are not due yet.
    void expire() {
        if (nearest > woken) return;
        nearest = clock::time_point::max();
        for (std::size_t i = 0; i < size(); ++i) {
            dispatcher* obj = map.get(at(i));
            if (!obj) continue;
            const auto due = obj->deadline();
            if (due > woken) {
                nearest = std::min(nearest, due);
                continue;
            }
            dry = false;
            if (large) map.touch(at(i));
            deliver(*obj, &dispatcher::handle_timeout);
        }
    }
};

void poll(std::optional<double> timeout, map_type* map) { map_type::pass(map_or_default(map)).run(timeout, false); }

void poll2(std::optional<double> timeout, map_type* map) { map_type::pass(map_or_default(map)).run(timeout, true); }

// The loop ends when nothing is registered any more: a program ends by closing what it has, not by leaving the loop.
//
// A pass asks everyone and lets the system look at everyone. With ten thousand connections of which twenty are busy,
// that is ten thousand questions for twenty events. But the next event comes mostly from those that were active a
// moment ago: the hot ones. Hot is an object that has had an event or a timeout or was registered since the last full
// pass but one, and every listener. So when only a few of a large map are hot, short passes over these alone follow a
// full one. They are passes like any other, with the same questions and the same select() or poll(), but for whom they
// ask.
//
// The others wait meanwhile. How long they should is the question of someone who rents skis and does not know how long
// the winter will be. The price of skis is what a full pass costs in processor time. A short pass waits no longer than
// that (by poll(), which counts in milliseconds, one of them at least). When nothing comes (it is dry) the next pass is
// a full one. However much comes, a full one follows when short ones have taken ten times that price, or when one of
// the others has a deadline. So full passes take about a tenth of the time of a busy loop, and an event of an object
// that is not hot waits ten full passes at most, and what the handlers of the last short pass take. The same bound
// holds for what a handler has changed in such an object: that it wants to read or to write, or has a nearer deadline.
//
// This saves time and decides nothing: a descriptor that is hot without need costs a question, one that is hot no
// longer waits for the next full pass. So it does no harm that a descriptor stays hot when it changes hands, or that a
// nested pass makes other ones hot. poll() and poll2() are one full pass each, and so is each of the `count` passes
// that a caller asked for.
void loop(std::optional<double> timeout, bool use_poll, map_type* map_, std::optional<int> count) {
    map_type& map = map_or_default(map_);
    double patience = -1;
    clock::time_point until{};   // of the short passes
    while (!map.empty() && count.value_or(1) > 0) {
        map_type::pass pass(map, patience);
        pass.run(timeout, use_poll);
        if (count) {
            --*count;
            continue;
        }
        if (pass.full()) {
            patience = std::chrono::duration<double>(pass.cost).count();
            until = std::min(pass.woken + 10 * pass.cost, pass.nearest);
        }
        if (pass.dry || pass.woken >= until || pass.many_hot()) patience = -1;
    }
}

// ---------------------------------------------------------------------------------------------------------
// dispatcher
// ---------------------------------------------------------------------------------------------------------

dispatcher::dispatcher(std::unique_ptr<socket_type> sock, map_type* map) : _map(&map_or_default(map)) {
    if (!sock) return;
    sock->setblocking(false);
    try {
        addr = sock->getpeername();
        connected = true;
    } catch (const std::system_error& error) {
        // A socket that is not connected may be given as well.
        if (error.code().value() != ENOTCONN && error.code().value() != EINVAL) throw;
    }
    socket = std::move(sock);
    _fileno = socket->fileno();
    _map->add(_fileno, *this);   // last: nothing can fail after it
}

// The descriptor is closed by ~socket_type. Nothing virtual is called: the subclass is gone already.
dispatcher::~dispatcher() { _map->remove(_fileno, *this); }

std::string dispatcher::repr() const {
    std::string text = "<" + class_name();
    if (accepting && !addr.none())
        text += " listening";
    else if (connected)
        text += " connected";
    if (!addr.none()) text += " " + addr.str();
    char id[32];
    std::snprintf(id, sizeof id, " at %#zx>", reinterpret_cast<std::size_t>(this));
    return text + id;
}

void dispatcher::add_channel(map_type* map) { (map ? map : _map)->add(_fileno, *this); }

// A closed object keeps no descriptor: what it did with the number later would happen to a newcomer.
void dispatcher::del_channel(map_type* map) {
    (map ? map : _map)->remove(_fileno, *this);
    _fileno = -1;
}

// By way of make_socket(), so that a subclass can have a socket of its own class.
void dispatcher::create_socket(int family, int type) {
    family_and_type = {family, type};
    set_socket(make_socket(family, type));
}

std::unique_ptr<socket_type> dispatcher::make_socket(int family, int type) {
    return std::make_unique<socket_type>(family, type);
}

// All that is done with the socket goes by here. Python finds no attribute in None; a null pointer would be a crash.
socket_type& dispatcher::the_socket() const {
    if (!socket) throw std::logic_error("the dispatcher has no socket");
    return *socket;
}

// The old socket's registration goes with it: an event that was collected for it must not reach the new one.
void dispatcher::set_socket(std::unique_ptr<socket_type> sock, map_type* map) {
    if (!sock) throw std::invalid_argument("there is no socket to set");
    _map->remove(_fileno, *this);
    socket = std::move(sock);
    _fileno = socket->fileno();
    add_channel(map);
}

// A server that is started again may bind while connections of its former self linger.
void dispatcher::set_reuse_addr() {
    try {
        the_socket().setsockopt(SOL_SOCKET, SO_REUSEADDR, socket->getsockopt(SOL_SOCKET, SO_REUSEADDR) | 1);
    } catch (const std::system_error&) {
        // a server without it can do its work
    }
}

// `accepting` is what makes it a listener for the handlers below: a read event is then a client.
void dispatcher::listen(int num) {
    accepting = true;
    the_socket().listen(num);
}

void dispatcher::bind(const address& address) {
    addr = address;
    the_socket().bind(address);
}

// A connection takes time, and the loop does not wait for it. EINPROGRESS and its relatives mean that it is under way:
// the first event on the socket says how it went (handle_connect_event). On the same host it may be there at once.
void dispatcher::connect(const address& address) {
    connected = false;
    connecting = true;
    const int err = the_socket().connect_ex(address);
    if (err != 0 && err != EISCONN && err != EINPROGRESS && err != EALREADY && !would_block(err)) raise(err, "connect");
    addr = address;
    if (err == 0 || err == EISCONN) handle_connect_event();
}

std::optional<std::pair<std::unique_ptr<socket_type>, address>> dispatcher::accept() {
    auto pair = the_socket().accept();
    if (!pair.first) return std::nullopt;
    return pair;
}

// No room is no error: nothing was taken, and the caller keeps it. A peer that is gone is the end of the session, and
// the caller sees that from `connected`.
std::size_t dispatcher::send(std::string_view data) {
    try {
        return the_socket().send(data);
    } catch (const std::system_error& error) {
        if (would_block(error.code().value())) return 0;
        if (!DISCONNECTED(error.code().value())) throw;
    }
    handle_close();
    return 0;
}

// By way of the shared buffer: the string is as long as what has come, not as what was asked for.
std::string dispatcher::recv(std::size_t buffer_size) {
    map_type::receive_buffer buffer(*_map, buffer_size);
    return std::string(buffer.bytes.data(), recv_into(buffer.bytes.data(), buffer_size));
}

// The end of input and a connection that was reset mean the same: handle_close(), and no bytes.
std::size_t dispatcher::recv_into(char* buffer, std::size_t size) {
    try {
        const std::size_t received = the_socket().recv(buffer, size);
        if (received > 0) return received;
    } catch (const std::system_error& error) {
        if (!DISCONNECTED(error.code().value())) throw;
    }
    handle_close();
    return 0;
}

// Leaves the map first and closes the socket last, because that is the one step that may fail. The object lives on
// until the pass ends (see above): the caller may be one of its own functions.
void dispatcher::close() {
    connected = accepting = connecting = false;
    del_channel();
    if (owned_) {
        owned_ = false;
        _map->closed_.splice(_map->closed_.end(), _map->owned_, self_);
    }
    if (!socket) return;
    try {
        socket->close();
    } catch (const std::system_error& error) {
        if (error.code().value() != ENOTCONN && error.code().value() != EBADF) throw;
    }
}

void dispatcher::log(std::string_view message) { std::cerr << "log: " << message << '\n'; }

void dispatcher::log_info(std::string_view message, std::string_view type) {
    if (std::find(ignore_log_types.begin(), ignore_log_types.end(), type) != ignore_log_types.end()) return;
    if (log_handler) return log_handler(message, type);
    std::cout << type << ": " << message << std::endl;
}

// A socket is one of three things. A listener is accepting: input means that a client waits. A socket that connect()
// has left under way is connecting: the first event says how that went, then it is connected. The loop calls these;
// they find out which it is, and call the handlers that a subclass overrides.
void dispatcher::handle_read_event() {
    if (accepting) return handle_accept();
    if (!connected && connecting) handle_connect_event();
    handle_read();
}

// SO_ERROR holds the outcome of a connect() that was under way; reading it clears it. As in Python, `connected` is
// still false while handle_connect() runs.
void dispatcher::handle_connect_event() {
    const int err = the_socket().getsockopt(SOL_SOCKET, SO_ERROR);
    if (err != 0) raise(err, "connect");
    handle_connect();
    connected = true;
    connecting = false;
}

void dispatcher::handle_write_event() {
    if (accepting) return;   // a listener has nothing to write
    if (!connected && connecting) handle_connect_event();
    handle_write();
}

void dispatcher::handle_expt_event() {
    // An exceptional condition is an error of the socket, or an urgent byte.
    if (the_socket().getsockopt(SOL_SOCKET, SO_ERROR) != 0)
        handle_close();
    else
        handle_expt();
}

// C++ can rethrow an exception to ask what it is, but has no traceback. The classes are those that a program would tell
// apart in a log.
std::string dispatcher::current_exception_text() {
    std::string type = "unknown exception", what;
    try {
        throw;
    } catch (const std::system_error& e) {
        type = "std::system_error", what = e.what();
    } catch (const std::bad_alloc& e) {
        type = "std::bad_alloc", what = e.what();
    } catch (const std::logic_error& e) {
        type = "std::logic_error", what = e.what();
    } catch (const std::runtime_error& e) {
        type = "std::runtime_error", what = e.what();
    } catch (const std::exception& e) {
        type = "std::exception", what = e.what();
    } catch (...) {}
    const std::string quoted = asyncore::repr(what);   // it may carry a stranger's bytes
    return type + ":" + quoted.substr(1, quoted.size() - 2);
}

void dispatcher::log_exception(std::string_view what) {
    quietly([&] { log_info(std::string(what) + " " + repr() + " (" + current_exception_text() + ")", "error"); });
}

void dispatcher::handle_error() {
    log_exception("uncaptured C++ exception, closing channel");
    // Python: what fails in here ends the loop; here the connection is all that is lost.
    if (!quietly([this] { handle_close(); }) && !quietly([this] { close(); })) quietly([this] { dispatcher::close(); });
}

void dispatcher::handle_expt() { log_info("unhandled incoming priority event", "warning"); }

void dispatcher::handle_read() { log_info("unhandled read event", "warning"); }

void dispatcher::handle_write() { log_info("unhandled write event", "warning"); }

void dispatcher::handle_connect() { log_info("unhandled connect event", "warning"); }

void dispatcher::handle_accept() {
    if (auto pair = accept()) handle_accepted(std::move(pair->first), pair->second);
}

void dispatcher::handle_accepted(std::unique_ptr<socket_type> sock, const address&) {
    sock->close();
    log_info("unhandled accepted event", "warning");
}

void dispatcher::handle_close() {
    log_info("unhandled close event", "warning");
    close();
}

// A subclass that has a deadline should say what it means. The default is what an idle connection deserves.
void dispatcher::handle_timeout() {
    log_info("unhandled timeout event", "warning");
    close();
}

// ---------------------------------------------------------------------------------------------------------
// dispatcher_with_send, close_all, file_wrapper, file_dispatcher
// ---------------------------------------------------------------------------------------------------------

// 64 KiB at a time: what the socket does not take has to be moved to the front again.
void dispatcher_with_send::initiate_send() {
    out_buffer.erase(0, dispatcher::send(std::string_view(out_buffer).substr(0, 65536)));
}

void dispatcher_with_send::handle_write() { initiate_send(); }

// A connection that is under way is told by a write event, so that is wanted although nothing is to be sent.
bool dispatcher_with_send::writable() { return !connected || !out_buffer.empty(); }

std::size_t dispatcher_with_send::send(std::string_view data) {
    if (debug) log_info("sending " + asyncore::repr(data, "b"));
    out_buffer += data;
    initiate_send();
    return data.size();
}

// Objects may close each other while they are closed, so the map is looked at anew for each descriptor.
void close_all(map_type* map_, bool ignore_all) {
    map_type& map = map_or_default(map_);
    map_type::visit visit(map);
    for (std::size_t fd = 0; fd < map.slots_.size(); ++fd) {
        dispatcher* obj = map.slots_[fd].object;
        if (!obj) continue;
        try {
            obj->close();
        } catch (const ExitNow&) {
            throw;
        } catch (const std::system_error& error) {
            if (error.code() != std::errc::bad_file_descriptor && !ignore_all) throw;
        } catch (...) {
            if (!ignore_all) throw;
        }
    }
    map.clear();
}

// A duplicate of its own: the caller may close the other one, and usually does.
file_wrapper::file_wrapper(int fd) : socket_type(::fcntl(fd, F_DUPFD_CLOEXEC, 0)) {
    if (fd_ < 0) raise(errno, "dup");
}

std::size_t file_wrapper::recv(char* buffer, std::size_t size, int) {
    return checked(uninterrupted([&] { return ::read(fd_, buffer, size); }), "read");
}

std::size_t file_wrapper::send(std::string_view data, int) {
    return checked(uninterrupted([&] { return ::write(fd_, data.data(), data.size()); }), "write");
}

int file_wrapper::getsockopt(int level, int option) const {
    if (level == SOL_SOCKET && option == SO_ERROR) return 0;
    throw NotImplementedError("Only asyncore specific behaviour implemented.");
}

// O_NONBLOCK belongs to the open file, not to the descriptor: another program that shares the file sees it too.
file_dispatcher::file_dispatcher(int fd, map_type* map) : dispatcher(nullptr, map) {
    connected = true;
    set_file(fd);
    set_nonblocking(fd, true);
}

void file_dispatcher::set_file(int fd) { set_socket(std::make_unique<file_wrapper>(fd)); }

// ---------------------------------------------------------------------------------------------------------
// trigger: not in asyncore.py
// ---------------------------------------------------------------------------------------------------------

// The read end is done with when file_dispatcher has its duplicate: that one is close-on-exec, and O_NONBLOCK, which
// file_dispatcher sets, is the open file's. So only the write end is prepared here.
static std::pair<socket_type, socket_type> make_pipe() {
    int ends[2];
    if (::pipe(ends) < 0) raise(errno, "pipe");
    std::pair<socket_type, socket_type> result{socket_type(ends[0]), socket_type(ends[1])};
    set_nonblocking(ends[1], true);
    if (::fcntl(ends[1], F_SETFD, FD_CLOEXEC) < 0) raise(errno, "fcntl");
    return result;
}

trigger::trigger(map_type* map) : trigger(make_pipe(), map) {}

trigger::trigger(std::pair<socket_type, socket_type> pipe, map_type* map)
    : file_dispatcher(pipe.first.fileno(), map), write_end_(std::move(pipe.second)) {}

// A pipe that is full wakes the loop as well, so a byte that finds no room is not missed.
void trigger::wake() noexcept {
    if (write_end_.fileno() >= 0) (void)!::write(write_end_.fileno(), "", 1);
}

// A pull_trigger() of another thread comes before this, and its thunk is dropped, or after it, and finds the end
// closed.
void trigger::close() {
    std::deque<std::function<void()>> dropped;   // destroyed without the lock: what they hold may pull the trigger
    {
        const std::lock_guard<std::mutex> guard(lock_);
        write_end_.close();
        dropped.swap(thunks_);
    }
    file_dispatcher::close();
}

// The lock is held for two lines, so no thread waits long. The thunk is queued before the byte is written: when the
// loop wakes, it is there.
void trigger::pull_trigger(std::function<void()> thunk) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (thunk) thunks_.push_back(std::move(thunk));
    wake();
}

// The pipe is emptied first. A thunk that is queued after that writes a byte of its own, so none is overlooked. Each
// thunk runs without the lock: it may pull the trigger again. Those that come meanwhile wait for the next pass, so that
// a thunk that queues itself does not hold up the loop.
void trigger::handle_read() {
    recv(4096);
    std::unique_lock<std::mutex> guard(lock_);
    for (std::size_t left = thunks_.size(); left > 0 && !thunks_.empty(); --left) {
        const auto thunk = std::move(thunks_.front());
        thunks_.pop_front();
        guard.unlock();
        try {
            thunk();
        } catch (const ExitNow&) {
            wake();   // for the thunks behind it, when the loop is entered again
            throw;
        } catch (...) {
            handle_error();
        }
        guard.lock();
    }
}

// A thunk that fails is not the end of the trigger: this closes nothing.
void trigger::handle_error() { log_exception("uncaptured C++ exception in a thunk of"); }

}   // namespace v1
}   // namespace asyncore

// ---------------------------------------------------------------------------------------------------------
// asynchat
// ---------------------------------------------------------------------------------------------------------

namespace asynchat {
inline namespace v1 {

async_chat::async_chat(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map)
    : dispatcher(std::move(sock), map) {}

void async_chat::collect_incoming_data(std::string_view) {
    throw asyncore::NotImplementedError("must be implemented in subclass");
}

void async_chat::_collect_incoming_data(std::string_view data) { incoming += data; }

// For a subclass that only gathers: hands out what _collect_incoming_data() has gathered, and forgets it.
std::string async_chat::_get_data() { return std::exchange(incoming, {}); }

void async_chat::found_terminator() { throw asyncore::NotImplementedError("must be implemented in subclass"); }

void async_chat::set_terminator(std::string_view term) { terminator_.emplace<std::string>(term); }

// Signed, so that a negative number is an error, as in Python, and no huge one.
void async_chat::set_terminator(std::ptrdiff_t count) {
    if (count < 0) throw std::invalid_argument("the number of received bytes must be positive");
    terminator_ = static_cast<std::size_t>(count);
}

void async_chat::set_terminator(std::nullopt_t) { terminator_ = std::monostate(); }

// How input becomes lines, and whose bytes they are. recv() fills the map's receive buffer, which all sessions share,
// and input_ is a view of it. consume_some() cuts pieces off its front; each piece goes to collect_incoming_data(),
// which must copy what it wants to keep, and a terminator to found_terminator(). There are three cases, as in Python:
// the terminator is in the input; its beginning may be at the end of it; or it is nowhere.
//
// What is left over has two reasons. It may be the beginning of a terminator: a few bytes, which stand in front of the
// next input, so that a terminator is always in one piece. Or the session was paused, or is owed room in the output
// queue: up to a whole buffer, and nothing more is read until consume() goes on with it. Either way the buffer goes
// back to the map, so keep_input() moves the rest to kept_, and input_ is a view of that.
void async_chat::handle_read() {
    using namespace asyncore;
    if (input_waits_) return;   // first what has come before
    const std::string left(input_);
    asyncore::map_type::receive_buffer buffer(*_map, left.size() + ac_in_buffer_size);
    char* const bytes = buffer.bytes.data();
    left.copy(bytes, left.size());
    std::size_t received = 0;
    try {
        received = recv_into(bytes + left.size(), ac_in_buffer_size);
    } catch (const std::system_error& error) {
        const int err = error.code().value();
        if (err != EAGAIN && err != EWOULDBLOCK) handle_error();
        return;
    }
    if (received == 0) return;
    input_ = std::string_view(bytes, left.size() + received);
    consumed_ = 0;
    try {
        consume();
    } catch (...) {
        keep_input();
        throw;
    }
    keep_input();
}

// Moves what is left of the input out of the loop's buffer. A large kept_ is given back once all of it has been
// handled.
void async_chat::keep_input() {
    if (!connected) input_ = {};
    if (input_.empty() && kept_.capacity() > 1024) std::string().swap(kept_);
    const std::string_view rest = std::exchange(input_, {});
    kept_.assign(rest.data(), rest.size());
    input_ = kept_;
    consumed_ = 0;
}

// Cuts the input at the terminators, a piece at a time: a handler may pause or close the session, or change the
// terminator. Input waits (input_waits_) when the session is the reason. The beginning of a terminator does not: it
// needs more input.
void async_chat::consume() {
    input_waits_ = false;
    try {
        // Python goes on when the session has been closed in between; here it stops.
        bool more = true;
        while (more && !input_.empty() && connected && !stalled()) more = consume_some();
        input_waits_ = more && !input_.empty();
    } catch (...) {
        input_waits_ = !input_.empty();   // Python looks at it when more has come, if ever
        throw;
    }
}

namespace {

// Where the needle begins. A message is full of line ends, so what is looked for is the needle's first byte that is
// neither CR nor LF: the dot of CR LF . CR LF. In the needle only CR and LF stand before it. So when a dot is not the
// needle's, the whole of the next needle lies behind that dot, and its own dot is at least that much further on. The
// first bytes are looked at one by one, because a call of find() costs more than they do.
std::size_t find_terminator(std::string_view haystack, std::string_view needle) {
    const std::size_t other = needle.find_first_not_of("\r\n"), rarest = other == needle.npos ? 0 : other;
    const char byte = needle[rarest];
    for (std::size_t at = rarest; at < haystack.size(); at += rarest + 1) {
        for (int near = 0; near < 4 && haystack[at] != byte; ++near)
            if (++at == haystack.size()) return haystack.npos;
        if (haystack[at] != byte && (at = haystack.find(byte, at)) == haystack.npos) break;
        const std::size_t start = at - rarest;
        if (rarest > 0 && haystack[at - 1] != needle[rarest - 1]) continue;
        std::size_t same = rarest + 1;
        while (same < needle.size() && start + same < haystack.size() && haystack[start + same] == needle[same]) ++same;
        if (same == needle.size() && haystack.substr(start, rarest) == needle.substr(0, rarest)) return start;
    }
    return haystack.npos;
}

}   // namespace

// One piece of input; false when the rest may be the beginning of a terminator. What a handler is given has been taken
// off before, and a count been lowered: the handler may set another terminator, and one that throws does not get the
// same bytes again.
bool async_chat::consume_some() {
    const auto take = [this](std::size_t size) {
        consumed_ += size;
        return std::exchange(input_, input_.substr(size)).substr(0, size);
    };
    if (auto* count = std::get_if<std::size_t>(&terminator_); count && *count > 0) {
        const std::string_view data = take(std::min(*count, input_.size()));
        const bool complete = *count == data.size();
        *count -= data.size();
        collect_incoming_data(data);
        if (complete) found_terminator();
        return true;
    }
    const auto* term = std::get_if<std::string>(&terminator_);
    const std::size_t index = term && !term->empty() ? find_terminator(input_, *term) : input_.npos;
    if (index != input_.npos) {
        const std::string_view data = take(index + term->size()).substr(0, index);
        if (!data.empty()) collect_incoming_data(data);
        found_terminator();
        return true;
    }
    const std::size_t prefix = term ? find_prefix_at_end(input_, *term) : 0;
    if (input_.size() > prefix) collect_incoming_data(take(input_.size() - prefix));
    return prefix == 0;
}

// What is put back is mostly what was just cut off, and that still stands in the buffer in front of the input: the view
// is widened, and nothing is copied.
void async_chat::unread(std::string_view bytes) {
    input_waits_ = true;   // outside of a read event the loop comes for it
    const std::string_view before(input_.data() - std::min(consumed_, bytes.size()), std::min(consumed_, bytes.size()));
    if (before == bytes) {
        input_ = {before.data(), before.size() + input_.size()};
        consumed_ -= bytes.size();
        return;
    }
    kept_ = std::string(bytes).append(input_);
    input_ = kept_;
    consumed_ = 0;
}

void async_chat::handle_write() { initiate_send(); }

void async_chat::handle_close() { close(); }

// The rest of what was meant for the old socket must not go out by the new one, behind a TLS handshake say.
void async_chat::set_socket(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map) {
    const bool replaced = connected;
    while (send_some()) {}
    if (replaced && !connected) return;   // it has been lost on the way
    if (replaced && !producer_fifo.empty())
        throw std::system_error(EAGAIN, std::generic_category(), "output for the old socket is still queued");
    dispatcher::set_socket(std::move(sock), map);
}

// The one exceptional condition of a socket is an urgent byte, and a session has no use for it. Left unread, it would
// be reported in each pass.
void async_chat::handle_expt() {
    char urgent;
    try {
        the_socket().recv(&urgent, 1, MSG_OOB);
    } catch (const std::system_error&) {
        // nothing urgent after all
    }
    dispatcher::handle_expt();
}

// Input that waited and may go on is overdue: the loop calls handle_timeout() at once. A paused session looks from time
// to time whether its peer is still there, since it waits for no event.
asyncore::clock::time_point async_chat::deadline() {
    if (must_go_on()) return asyncore::at_once;
    if (paused_) return look_again_at_;
    return readable() && socket && socket->pending() ? asyncore::at_once : asyncore::never;
}

// A deadline that is none of these is a subclass's own: dispatcher's handle_timeout() closes.
void async_chat::handle_timeout() {
    if (must_go_on()) return consume();
    if (!paused_) return socket && socket->pending() ? handle_read_event() : dispatcher::handle_timeout();
    pollfd gone{_fileno, 0, 0};   // asks for no event, but is told of a reset or a hang-up
    if (::poll(&gone, 1, 0) > 0) return handle_close();
    look_again_at_ = asyncore::clock::now() + std::chrono::seconds(1);
}

// The first look comes a second later, since most replies come sooner than that.
void async_chat::pause() {
    paused_ = true;
    look_again_at_ = asyncore::clock::now() + std::chrono::seconds(1);
}

// The text that send_first() has in hand is not in the queue, so sent_ may be more than all that is there.
std::size_t async_chat::queued() const {
    std::size_t size = 0;
    for (const auto& item : producer_fifo)
        if (const auto* text = std::get_if<std::string>(&item)) size += text->size();
    return size - std::min(size, sent_);
}

void async_chat::push(std::string_view data) {
    queue(data);
    initiate_send();
}

// Puts text into the last item, in pieces of ac_out_buffer_size. An item that send() has in hand is left alone.
void async_chat::queue(std::string_view data) {
    while (!data.empty()) {
        auto* last =
            producer_fifo.size() <= (sending_ ? 1 : 0) ? nullptr : std::get_if<std::string>(&producer_fifo.back());
        if (!last || last->size() >= ac_out_buffer_size)
            last = &std::get<std::string>(producer_fifo.emplace_back(std::exchange(spare_, {})));
        const auto piece = data.substr(0, ac_out_buffer_size - last->size());
        last->append(piece);
        data.remove_prefix(piece.size());
    }
}

// Shared: refill() holds on to the producer while it is asked, though the queue may be discarded in the meantime.
void async_chat::push_with_producer(std::shared_ptr<producer> source) {
    producer_fifo.emplace_back(std::move(source));
    initiate_send();
}

bool async_chat::readable() { return !stalled() && !input_waits_; }

// A session that is not connected yet waits for that, which is a write event.
bool async_chat::writable() { return !producer_fifo.empty() || !connected; }

// The mark has its place in the queue, so that what is pushed later is not sent.
void async_chat::close_when_done() { producer_fifo.emplace_back(close_mark{}); }

void async_chat::initiate_send() { send_some(); }

// When output is sent. push() puts text into the queue and calls initiate_send() at once, so a reply is on its way when
// push() returns. What the socket does not take stays in the queue, writable() is true, and the loop comes back for the
// rest. A producer is asked for a piece only when everything before it has gone: a large message is never in the queue
// as a whole. A close mark closes the session when all before it has been sent. SMTPChannel puts off initiate_send()
// until the event is over, so that the replies to pipelined commands go in one packet.
//
// One send() a call, as in Python; but what needs none is done at once: a producer that has come to its end goes, and a
// close that only waited for this is done. True: an item is gone, and there may be more that can be sent.
bool async_chat::send_some() {
    if (sending_) return false;   // a send() or a producer that pushes
    struct busy {
        bool& flag;
        explicit busy(bool& f) : flag(f) { flag = true; }
        ~busy() { flag = false; }
    } busy(sending_);
    bool sent = false;
    while (sending_ && !producer_fifo.empty() && connected) {
        if (std::holds_alternative<close_mark>(producer_fifo.front())) {
            producer_fifo.pop_front();
            handle_close();
            return false;
        }
        if (std::holds_alternative<std::string>(producer_fifo.front())) {
            if (sent) return true;
            if (!send_first()) return false;
            sent = true;
        } else {
            refill();
        }
    }
    return false;
}

// Sends from the first item, which is a string. True: all of it has gone. A send() that is overridden may push,
// close, or discard the queue; so the text is taken out meanwhile, and an empty string keeps its place.
bool async_chat::send_first() {
    std::string text = std::exchange(std::get<std::string>(producer_fifo.front()), {});
    const std::size_t size = text.size();
    const auto put_back = [this, &text] {
        if (!sending_ || producer_fifo.empty() || !std::holds_alternative<std::string>(producer_fifo.front()))
            return false;   // the queue has been discarded
        std::get<std::string>(producer_fifo.front()) = std::move(text);
        return true;
    };
    std::size_t taken = 0;
    try {
        taken = send(std::string_view(text).substr(sent_, ac_out_buffer_size));
    } catch (const std::system_error&) {
        put_back();
        handle_error();
        return false;
    } catch (...) {
        put_back();
        throw;
    }
    if (!put_back()) return false;
    sent_ += taken;
    if (sent_ < size) return false;
    spare_ = std::move(std::get<std::string>(producer_fifo.front()));
    spare_.clear();
    if (spare_.capacity() > 1024) spare_ = {};
    producer_fifo.pop_front();
    sent_ = 0;
    return true;
}

// Asks the first producer for its next piece and queues that in front of it. more() may discard the queue, so the
// producer is held, and the queue looked at again afterwards.
void async_chat::refill() {
    const auto source = std::get<std::shared_ptr<producer>>(producer_fifo.front());
    std::string data = source->more();
    auto* first = producer_fifo.empty() ? nullptr : std::get_if<std::shared_ptr<producer>>(&producer_fifo.front());
    if (!first || *first != source) return;
    if (data.empty())
        producer_fifo.pop_front();
    else
        producer_fifo.emplace_front(std::move(data));
}

void async_chat::discard_input() {
    input_ = {};
    kept_.clear();
    incoming.clear();
    consumed_ = 0;
    input_waits_ = false;
}

// sending_ tells a send_some() further up the stack that its queue has gone.
void async_chat::discard_buffers() {
    discard_input();
    producer_fifo.clear();
    sent_ = 0;
    sending_ = false;
}

simple_producer::simple_producer(std::string data, std::size_t buffer_size)
    : data_(std::move(data)), buffer_size_(buffer_size) {}

// A piece is copied out and the text stays as it is: cutting its front off would move the rest each time.
std::string simple_producer::more() {
    std::string result = data_.substr(sent_, buffer_size_);
    sent_ += result.size();
    return result;
}

// From the longest possible beginning to the shortest: CR LF at the end of the input may become CR LF . CR LF.
std::size_t find_prefix_at_end(std::string_view haystack, std::string_view needle) {
    if (needle.empty()) return 0;
    std::size_t length = std::min(needle.size() - 1, haystack.size());
    while (length > 0 && haystack.substr(haystack.size() - length) != needle.substr(0, length)) --length;
    return length;
}

}   // namespace v1
}   // namespace asynchat

// ---------------------------------------------------------------------------------------------------------
// What Python has built in, or imports: repr(), addresses and sockets, and the map, which is a dict there
// ---------------------------------------------------------------------------------------------------------

namespace asyncore {
inline namespace v1 {

namespace {

#ifdef MSG_NOSIGNAL
constexpr int no_signal = MSG_NOSIGNAL;
#else
constexpr int no_signal = 0;
#endif

// A new socket. Where socket() and accept() can't be told so, it is made non-blocking and close-on-exec here.
socket_type prepared(int fd) {
    socket_type sock(fd);
#ifndef SOCK_NONBLOCK
    set_nonblocking(fd, true);
    if (::fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) raise(errno, "fcntl");
#endif
    return sock;
}

sockaddr* generic(sockaddr_storage& storage) { return reinterpret_cast<sockaddr*>(&storage); }

// The address in the form that system calls take. A name is resolved here, and that may block: the first address of
// the socket's family is taken.
socklen_t to_sockaddr(const address& addr, const socket_type& sock, sockaddr_storage& storage) {
    std::memset(&storage, 0, sizeof storage);
    const auto port = htons(static_cast<std::uint16_t>(addr.port));
    if (addr.family == AF_UNIX) {
        auto& un = reinterpret_cast<sockaddr_un&>(storage);
        un.sun_family = AF_UNIX;
        addr.host.copy(un.sun_path, sizeof un.sun_path - 1);
        return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + addr.host.size() + 1);
    }
    if (addr.family == AF_INET6) {
        auto& in6 = reinterpret_cast<sockaddr_in6&>(storage);
        in6.sin6_family = AF_INET6;
        in6.sin6_port = port;
        in6.sin6_flowinfo = htonl(addr.flowinfo);
        in6.sin6_scope_id = addr.scope_id;
        if (::inet_pton(AF_INET6, addr.host.c_str(), &in6.sin6_addr) != 1) raise(EINVAL, "inet_pton");
        return sizeof in6;
    }
    if (addr.family == AF_INET) {
        auto& in = reinterpret_cast<sockaddr_in&>(storage);
        in.sin_family = AF_INET;
        in.sin_port = port;
        if (::inet_pton(AF_INET, addr.host.c_str(), &in.sin_addr) != 1) raise(EINVAL, "inet_pton");
        return sizeof in;
    }
    return to_sockaddr(getaddrinfo(addr, sock.getsockname().family).front(), sock, storage);
}

}   // namespace

// Python puts the text in apostrophes; in quotes when it has an apostrophe and no quote.
std::string repr(std::string_view bytes, std::string_view prefix) {
    const bool apostrophe = bytes.find('\'') != bytes.npos && bytes.find('"') == bytes.npos;
    const char quote = apostrophe ? '"' : '\'';
    std::string text(prefix);
    text += quote;
    for (const char c : bytes) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == quote || c == '\\') {
            text += '\\';
            text += c;
        } else if (c == '\n') {
            text += "\\n";
        } else if (c == '\r') {
            text += "\\r";
        } else if (c == '\t') {
            text += "\\t";
        } else if (byte < 0x20 || byte >= 0x7f) {
            text += "\\x";
            text += "0123456789abcdef"[byte >> 4];
            text += "0123456789abcdef"[byte & 15];
        } else {
            text += c;
        }
    }
    text += quote;
    return text;
}

// ---------------------------------------------------------------------------------------------------------
// Addresses and sockets
// ---------------------------------------------------------------------------------------------------------

address::address(std::string host_, int port_) : host(std::move(host_)), port(port_) {
    if (port < 0 || port > 65535) throw std::out_of_range("port must be 0-65535.");
}

address address::unix_path(std::string path) {
    if (path.size() >= sizeof(sockaddr_un::sun_path)) throw std::out_of_range("AF_UNIX path too long");
    address addr;
    addr.family = AF_UNIX;
    addr.host = std::move(path);
    return addr;
}

// A UNIX socket without a name, such as a client's, has the path "". A path may come with or without its NUL.
address address::from(const sockaddr_storage& storage, socklen_t size) {
    address addr;
    addr.family = storage.ss_family;
    char text[INET6_ADDRSTRLEN] = "";
    if (storage.ss_family == AF_INET) {
        const auto& in = reinterpret_cast<const sockaddr_in&>(storage);
        addr.host = ::inet_ntop(AF_INET, &in.sin_addr, text, sizeof text);
        addr.port = ntohs(in.sin_port);
    } else if (storage.ss_family == AF_INET6) {
        const auto& in6 = reinterpret_cast<const sockaddr_in6&>(storage);
        addr.host = ::inet_ntop(AF_INET6, &in6.sin6_addr, text, sizeof text);
        addr.port = ntohs(in6.sin6_port);
        addr.flowinfo = ntohl(in6.sin6_flowinfo);
        addr.scope_id = in6.sin6_scope_id;
    } else if (storage.ss_family == AF_UNIX && size > offsetof(sockaddr_un, sun_path)) {
        const auto& un = reinterpret_cast<const sockaddr_un&>(storage);
        const std::string_view path(un.sun_path, size - offsetof(sockaddr_un, sun_path));
        addr.host = path.substr(0, path.find('\0'));
    }
    return addr;
}

std::string address::repr() const {
    if (none()) return "None";
    if (family == AF_UNIX) return asyncore::repr(host);
    std::string text = "(" + asyncore::repr(host) + ", " + std::to_string(port);
    if (family == AF_INET6) text += ", " + std::to_string(flowinfo) + ", " + std::to_string(scope_id);
    return text + ")";
}

std::string address::str() const {
    if (none() || family == AF_UNIX || family == AF_INET6) return repr();
    return host + ":" + std::to_string(port);
}

// EAI_ codes are no errnos: without a category of their own they would get an errno's text.
const std::error_category& gai_category() noexcept {
    static const struct : std::error_category {
        const char* name() const noexcept override { return "getaddrinfo"; }
        std::string message(int code) const override { return ::gai_strerror(code); }
    } category;
    return category;
}

// An address whose family is known is numeric already. Without SOCK_STREAM each would come once for each type.
std::vector<address> getaddrinfo(const address& name, int family) {
    if (name.family != AF_UNSPEC) return {name};
    addrinfo hints{};
    hints.ai_family = family;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV;
    addrinfo* found = nullptr;
    const int code = ::getaddrinfo(name.host.c_str(), std::to_string(name.port).c_str(), &hints, &found);
    if (code == EAI_SYSTEM) raise(errno, "getaddrinfo");
    if (code != 0) throw std::system_error(code, gai_category());
    const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, &::freeaddrinfo);
    std::vector<address> all;
    for (; found; found = found->ai_next) {
        sockaddr_storage storage{};
        std::memcpy(&storage, found->ai_addr, std::min<std::size_t>(found->ai_addrlen, sizeof storage));
        all.push_back(address::from(storage, found->ai_addrlen));
    }
    if (all.empty()) throw std::system_error(EAI_NONAME, gai_category());
    return all;
}

// The first name with a dot that the host's own addresses have; otherwise what the host calls itself.
std::string getfqdn() {
    char text[NI_MAXHOST] = "localhost";
    if (::gethostname(text, sizeof text - 1) < 0) return text;
    const std::string name = text;
    try {
        for (const auto& addr : getaddrinfo(address(name, 0))) {
            sockaddr_storage storage;
            const auto size = to_sockaddr(addr, socket_type(), storage);
            const int code = ::getnameinfo(generic(storage), size, text, sizeof text, nullptr, 0, NI_NAMEREQD);
            if (code == 0 && std::string_view(text).find('.') != std::string_view::npos) return text;
        }
    } catch (const std::system_error&) {
        // a host that does not know its own name
    }
    return name;
}

// macOS has this option in place of MSG_NOSIGNAL.
socket_type::socket_type(int fd) noexcept : fd_(fd) {
#ifdef SO_NOSIGPIPE
    const int on = 1;
    if (fd_ >= 0) ::setsockopt(fd_, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
}

socket_type::socket_type(int family, int type) : fd_(-1) {
#ifdef SOCK_NONBLOCK
    type |= SOCK_NONBLOCK | SOCK_CLOEXEC;
#endif
    const int fd = ::socket(family, type, 0);
    if (fd < 0) raise(errno, "socket");
    *this = prepared(fd);
}

// By a swap: the other one closes what this one had.
socket_type& socket_type::operator=(socket_type&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
}

socket_type::~socket_type() {
    if (fd_ >= 0) ::close(fd_);
}

std::size_t socket_type::recv(char* buffer, std::size_t size, int flags) {
    return checked(uninterrupted([&] { return ::recv(fd_, buffer, size, flags); }), "recv");
}

std::size_t socket_type::send(std::string_view data, int flags) {
    return checked(uninterrupted([&] { return ::send(fd_, data.data(), data.size(), flags | no_signal); }), "send");
}

int socket_type::getsockopt(int level, int option) const {
    int value = 0;
    socklen_t size = sizeof value;
    if (::getsockopt(fd_, level, option, &value, &size) < 0) raise(errno, "getsockopt");
    return value;
}

void socket_type::setsockopt(int level, int option, int value) {
    if (::setsockopt(fd_, level, option, &value, sizeof value) < 0) raise(errno, "setsockopt");
}

// EINTR: the descriptor has gone all the same. A second close() might hit one that another thread has just opened.
void socket_type::close() {
    if (fd_ < 0) return;
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) < 0 && errno != EINTR) raise(errno, "close");
}

void socket_type::setblocking(bool flag) { set_nonblocking(fd_, !flag); }

void socket_type::bind(const address& addr) {
    sockaddr_storage storage;
    const auto size = to_sockaddr(addr, *this, storage);
    if (::bind(fd_, generic(storage), size) < 0) raise(errno, "bind");
}

void socket_type::listen(int backlog) {
    if (::listen(fd_, backlog) < 0) raise(errno, "listen");
}

// Not repeated when a signal interrupts it: the connection goes on by itself, and a second call would be an error.
int socket_type::connect_ex(const address& addr) {
    sockaddr_storage storage;
    const auto size = to_sockaddr(addr, *this, storage);
    if (::connect(fd_, generic(storage), size) == 0) return 0;
    return errno == EINTR ? EINPROGRESS : errno;
}

// A client that has gone before it was accepted is none. accept4() saves two system calls where there is one.
std::pair<std::unique_ptr<socket_type>, address> socket_type::accept() {
    sockaddr_storage storage{};
    socklen_t size = sizeof storage;
    const int fd = uninterrupted([&] {
        size = sizeof storage;
#ifdef SOCK_NONBLOCK
        return ::accept4(fd_, generic(storage), &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
        return ::accept(fd_, generic(storage), &size);
#endif
    });
    if (fd < 0 && (would_block(errno) || errno == ECONNABORTED)) return {};
    if (fd < 0) raise(errno, "accept");
    socket_type sock = prepared(fd);   // closes it when there is no memory
    return {std::make_unique<socket_type>(std::move(sock)), address::from(storage, size)};
}

address socket_type::getpeername() const {
    sockaddr_storage storage{};
    socklen_t size = sizeof storage;
    if (::getpeername(fd_, generic(storage), &size) < 0) raise(errno, "getpeername");
    return address::from(storage, size);
}

address socket_type::getsockname() const {
    sockaddr_storage storage{};
    socklen_t size = sizeof storage;
    if (::getsockname(fd_, generic(storage), &size) < 0) raise(errno, "getsockname");
    return address::from(storage, size);
}

// ---------------------------------------------------------------------------------------------------------
// The socket map
// ---------------------------------------------------------------------------------------------------------

map_type::map_type() = default;
map_type::~map_type() { clear(); }

dispatcher* map_type::get(int fd) const noexcept {
    const auto index = static_cast<std::size_t>(fd);   // -1 is beyond any size
    return index < slots_.size() ? slots_[index].object : nullptr;
}

std::uint64_t map_type::registration(int fd) const noexcept {
    const auto index = static_cast<std::size_t>(fd);
    return index < slots_.size() ? slots_[index].registration : 0;
}

std::vector<dispatcher*> map_type::values() const {
    std::vector<dispatcher*> all;
    for (const auto& entry : slots_)
        if (entry.object) all.push_back(entry.object);
    return all;
}

// Descriptors are small numbers, so the slots are an array. An object that takes the descriptor of another one which
// did not leave takes its place, as in Python's dict.
void map_type::add(int fd, dispatcher& object) {
    const auto index = static_cast<std::size_t>(fd);
    if (fd < 0) throw std::invalid_argument("a closed socket cannot be registered");
    if (index >= slots_.size()) slots_.resize(index + 1);
    hot_.reserve(slots_.capacity());   // so that touch() can't fail
    heat_.resize(slots_.size());
    touch(fd);
    if (!slots_[index].object) ++size_;
    slots_[index] = {&object, ++registrations_};
}

// An object whose place another one has taken leaves that one alone.
void map_type::remove(int fd, const dispatcher& object) noexcept {
    if (get(fd) != &object) return;
    slots_[static_cast<std::size_t>(fd)] = {};
    --size_;
}

// Makes a descriptor hot: short passes ask it (see loop()), until it has not been touched between two full ones.
void map_type::touch(int fd) noexcept {
    const auto index = static_cast<std::size_t>(fd);
    if (index >= heat_.size()) return;
    if (heat_[index] == 0) hot_.push_back(fd);
    heat_[index] = 2;
}

void map_type::own(std::unique_ptr<dispatcher> object) {
    if (!object) throw std::invalid_argument("there is no object to own");
    if (object->_map != this) throw std::invalid_argument("the object is registered with another map");
    if (get(object->_fileno) != object.get()) return closed_.push_back(std::move(object));
    dispatcher& it = *object;
    owned_.push_back(std::move(object));
    it.owned_ = true;
    it.self_ = std::prev(owned_.end());
}

// A destructor may close another object, which then joins the list: so the list is taken as a whole, until none is
// left.
void map_type::destroy_closed() noexcept {
    while (depth_ == 0 && !closed_.empty()) {
        std::list<std::unique_ptr<dispatcher>> dead;
        dead.swap(closed_);
    }
}

// The slots go first, so that a destructor that looks for its own finds nothing.
void map_type::clear() {
    slots_.clear();
    hot_.clear();
    heat_.clear();
    size_ = 0;
    for (auto& object : owned_) object->owned_ = false;
    closed_.splice(closed_.end(), owned_);
    destroy_closed();
}

// A static inside a function is made when it is first needed: a server that is a static object itself finds it.
map_type& default_socket_map() {
    static map_type map;
    return map;
}

}   // namespace v1
}   // namespace asyncore
