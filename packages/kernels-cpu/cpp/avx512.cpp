#define NAMESPACE avx512
#include "noise.inc.hpp"
#include "release.inc.hpp"
#include "squares.inc.hpp"
