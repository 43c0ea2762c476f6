// What C functions need to be exported, and to be there for the instruction sets that were built.
#pragma once

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

#ifdef DPFA_X86
#define ON_X86(statement) statement
#define HIGHEST 2
#else
#define ON_X86(statement)
#define HIGHEST 0
#endif

// Calls NAME of the level's instruction set; 0, or 1 for a level that was not built.
#define AT_LEVEL(level, NAME, ...)                                   \
    if (level == 0) dpfa::portable::NAME(__VA_ARGS__);               \
    ON_X86(if (level == 1) dpfa::avx2::NAME(__VA_ARGS__);)           \
    ON_X86(if (level == 2) dpfa::avx512::NAME(__VA_ARGS__);)         \
    return level < 0 || level > HIGHEST
