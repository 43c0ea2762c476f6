#define NAMESPACE avx2
#include "noise.inc.hpp"
#include "release.inc.hpp"
#include "squares.inc.hpp"
