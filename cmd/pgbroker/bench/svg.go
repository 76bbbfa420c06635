package bench

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// A point is one measurement of a chart.
type point struct{ x, y float64 }

// A series is a line of a chart.
type series struct {
	name   string
	points []point
	dashed bool // for what is there to compare with
}

// A chart is a plot of lines.
type chart struct {
	title, x, y string // texts
	logX, logY  bool
	bytes       bool // whether y is in bytes
	series      []series
}

// The look of charts, in pixels.
const (
	chartWidth, chartHeight       = 760, 400
	left, right, top, bottom      = 78, 24, 48, 92
	plotWidth                     = chartWidth - left - right
	plotHeight                    = chartHeight - top - bottom
	axisColor, gridColor, inkText = "#8a9099", "#e3e6ea", "#2b2f36"
)

// Colours that people with any kind of sight can tell apart (Okabe and Ito), and a marker for each.
var palette = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"}

// An axis maps values to pixels.
type axis struct {
	low, high float64
	log       bool
	from, to  float64 // pixels
}

func newAxis(values []float64, log bool, from, to float64) axis {
	a := axis{log: log, from: from, to: to}
	if log {
		values = slices.DeleteFunc(slices.Clone(values), func(v float64) bool { return v <= 0 })
	}
	if len(values) == 0 {
		values = []float64{1}
	}
	a.low, a.high = slices.Min(values), slices.Max(values)
	if log {
		a.low, a.high = math.Pow(10, math.Floor(math.Log10(a.low))), math.Pow(10, math.Ceil(math.Log10(a.high)))
		if a.low == a.high {
			a.high *= 10
		}
		return a
	}
	step := niceStep(a.high)
	a.low, a.high = 0, step*math.Ceil(a.high/step)
	if a.high <= 0 {
		a.high = 1
	}
	return a
}

// niceStep returns 1, 2 or 5 times a power of ten, so that about five steps reach a value.
func niceStep(high float64) float64 {
	if high <= 0 {
		return 1
	}
	rough := high / 5
	power := math.Pow(10, math.Floor(math.Log10(rough)))
	for _, factor := range []float64{1, 2, 5, 10} {
		if factor*power >= rough {
			return factor * power
		}
	}
	return 10 * power
}

// at returns the pixel of a value.
func (a axis) at(value float64) float64 {
	part := 0.0
	switch {
	case !a.log:
		part = (value - a.low) / (a.high - a.low)
	case value > 0:
		part = (math.Log10(value) - math.Log10(a.low)) / (math.Log10(a.high) - math.Log10(a.low))
	}
	return a.from + part*(a.to-a.from)
}

// ticks returns the values that are marked.
func (a axis) ticks() []float64 {
	var ticks []float64
	if a.log {
		for value := a.low; value <= a.high*1.0001; value *= 10 {
			ticks = append(ticks, value)
		}
		return ticks
	}
	step := niceStep(a.high)
	for i := 0; float64(i)*step <= a.high*1.0001; i++ {
		ticks = append(ticks, float64(i)*step)
	}
	return ticks
}

// showTick writes a value of an axis in short.
func showTick(value float64) string {
	switch {
	case value >= 1e9:
		return fmt.Sprintf("%gG", value/1e9)
	case value >= 1e6:
		return fmt.Sprintf("%gM", value/1e6)
	case value >= 1e3:
		return fmt.Sprintf("%gk", value/1e3)
	default:
		return fmt.Sprintf("%.4g", value)
	}
}

// svg draws the chart.
func (c *chart) svg() []byte {
	var xs, ys []float64
	for _, s := range c.series {
		for _, p := range s.points {
			xs, ys = append(xs, p.x), append(ys, p.y)
		}
	}
	x, y := newAxis(xs, c.logX, left, left+plotWidth), newAxis(ys, c.logY, top+plotHeight, top)
	if c.bytes {
		y = newAxis(scaled(ys, 1<<20), c.logY, top+plotHeight, top)
	}

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s" `+
		`font-family="system-ui, sans-serif" font-size="13" fill="%s">`+"\n",
		chartWidth, chartHeight, chartWidth, chartHeight, html.EscapeString(c.title), inkText)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, chartHeight)
	text(&b, left, 26, "start", `font-size="16" font-weight="600"`, c.title)
	for _, tick := range y.ticks() {
		at := y.at(tick)
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="%s"/>`+"\n", left, left+plotWidth, at, at, gridColor)
		text(&b, left-8, at+4, "end", "", showTick(tick))
	}
	for _, tick := range x.ticks() {
		at := x.at(tick)
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="%s"/>`+"\n", at, at, top+plotHeight, top+plotHeight+5, axisColor)
		text(&b, at, top+plotHeight+20, "middle", "", showTick(tick))
	}
	fmt.Fprintf(&b, `<path d="M%d %dV%dH%d" fill="none" stroke="%s"/>`+"\n", left, top, top+plotHeight, left+plotWidth, axisColor)
	text(&b, left+plotWidth/2, top+plotHeight+42, "middle", "", c.x)
	unit := c.y
	if c.bytes {
		unit += " (MiB)"
	}
	fmt.Fprintf(&b, `<text transform="translate(20 %d) rotate(-90)" text-anchor="middle">%s</text>`+"\n", top+plotHeight/2, html.EscapeString(unit))
	for i, s := range c.series {
		points := s.points
		if c.bytes {
			points = slices.Clone(points)
			for j := range points {
				points[j].y /= 1 << 20
			}
		}
		c.line(&b, i, series{s.name, points, s.dashed}, x, y)
	}
	c.legend(&b)
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

func scaled(values []float64, by float64) []float64 {
	out := make([]float64, len(values))
	for i, v := range values {
		out[i] = v / by
	}
	return out
}

func (c *chart) line(b *strings.Builder, i int, s series, x, y axis) {
	color := palette[i%len(palette)]
	slices.SortFunc(s.points, func(p, q point) int { return int(math.Copysign(1, p.x-q.x)) })
	var path strings.Builder
	for j, p := range s.points {
		command := 'L'
		if j == 0 {
			command = 'M'
		}
		fmt.Fprintf(&path, "%c%.1f %.1f", command, x.at(p.x), y.at(p.y))
	}
	fmt.Fprintf(b, `<path d="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", path.String(), color, dash(s.dashed))
	for _, p := range s.points {
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", x.at(p.x), y.at(p.y), color)
	}
}

func dash(dashed bool) string {
	if dashed {
		return ` stroke-dasharray="6 4"`
	}
	return ""
}

// legend names the lines below the plot.
func (c *chart) legend(b *strings.Builder) {
	const characterWidth, lineHeight = 7.3, 18
	x, y := float64(left), float64(top+plotHeight+64)
	for i, s := range c.series {
		width := 40 + characterWidth*float64(len([]rune(s.name)))
		if x+width > chartWidth-right && x > left {
			x, y = left, y+lineHeight
		}
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="2"%s/>`+"\n",
			x, x+20, y-4, y-4, palette[i%len(palette)], dash(s.dashed))
		text(b, x+26, y, "start", "", s.name)
		x += width
	}
}

func text(b *strings.Builder, x, y float64, anchor, style, content string) {
	if style != "" {
		style = " " + style
	}
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s"%s>%s</text>`+"\n", x, y, anchor, style, html.EscapeString(content))
}
