// Serves the calls of a native library to a Python of another processor: requests on stdin, answers on stdout. Run under qemu-aarch64
// with the library's path; remote.py is the other side. Every piece of memory ends where a page that nobody may touch begins, so a
// kernel that reads or writes beyond what it was given ends this program.
// Left out: what the calls mean. Addresses arrive as this process's own, structures as the bytes that both processors agree on.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr uint64_t PAGE = 65536;  // the largest that an Arm kernel uses

void get(void* to, size_t size) {
    if (size && fread(to, 1, size, stdin) != size) exit(feof(stdin) ? 0 : 1);
}
void put(const void* from, size_t size) {
    if (size && fwrite(from, 1, size, stdout) != size) exit(1);
}
template <class T>
T get() {
    T value;
    get(&value, sizeof(value));
    return value;
}

uint64_t pages_of(uint64_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

// `size` bytes that end at a guarded page.
uint8_t* take(uint64_t size) {
    void* memory = mmap(nullptr, pages_of(size) + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) exit(2);
    uint8_t* end = static_cast<uint8_t*>(memory) + pages_of(size);
    if (mprotect(end, PAGE, PROT_NONE)) exit(2);
    return end - size;
}

void give_back(uint8_t* place, uint64_t size) { munmap(place + size - pages_of(size), pages_of(size) + PAGE); }

}  // namespace

int main(int count, char** arguments) {
    void* library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
    if (library == nullptr) {
        fprintf(stderr, "%s\n", count == 2 ? dlerror() : "usage: neon_main LIBRARY");
        return 2;
    }
    for (;;) {
        const char request = get<char>();
        const uint64_t first = get<uint64_t>(), size = get<uint64_t>();  // of a call and a file: the length of its name, nothing
        uint8_t* const place = reinterpret_cast<uint8_t*>(first);
        if (request == 't') {
            const uint8_t* taken = take(first);
            put(&taken, sizeof(taken));
        } else if (request == 'g') {
            give_back(place, size);
        } else if (request == 'w') {
            get(place, size);
        } else if (request == 'r') {
            put(place, size);
        } else if (request == 'o') {  // a file by its path; its number, -1 where that fails
            char path[4096] = {0};
            if (first >= sizeof(path)) return 1;
            get(path, first);
            const int64_t file = open(path, O_RDONLY | O_CLOEXEC);
            put(&file, sizeof(file));
        } else if (request == 'x') {
            close(static_cast<int>(first));
        } else if (request == 'c') {
            char name[64] = {0};
            if (first >= sizeof(name)) return 1;
            get(name, first);
            int64_t whole[9];
            get(whole, sizeof(whole));
            const float real = get<float>();
            // Integers and addresses go in x0 to x7 and on the stack, a float in s0, whatever their order in the signature: one type calls them all.
            typedef int64_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
            const Function function = reinterpret_cast<Function>(dlsym(library, name));
            if (function == nullptr) return 1;
            const int64_t result = function(whole[0], whole[1], whole[2], whole[3], whole[4], whole[5], whole[6], whole[7], whole[8], real);
            put(&result, sizeof(result));
        } else {
            return 1;
        }
        fflush(stdout);
    }
}
